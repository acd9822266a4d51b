# The torch wheels bring their own CUDA libraries; the base gives the driver's mounts and the rest.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# gcc and Python's headers: Triton builds its launcher with them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        gcc=4:13.2.* git=1:2.43.* libc6-dev=2.39-* make=4.3-* \
        python3=3.12.* python3-dev=3.12.* python3-venv=3.12.* \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY requirements.txt /tmp/requirements.txt
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -r /tmp/requirements.txt

# The mounted project belongs to the host's user; records name its commit.
RUN git config --system --add safe.directory /workspace
WORKDIR /workspace
