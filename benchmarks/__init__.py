"""What the scripts cost, measured: each script ends in one table and a section of RESULTS.md."""
