"use strict";
const byId = (id) => document.getElementById(id);
const ASKING = ["score", "neurons", "pictures", "edit"];
const POLL = 300; // milliseconds between looks at a job
const RETRY = 3000; // after a look that failed
let session = null;
let shownPictures = "";
let timer = 0;

async function send(path, content) {
  const options = content === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: is app.py still running?");
  }
  const found = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw Object.assign(new Error(found.error), { status: answer.status });
  return found;
}

function complain(sentence) {
  byId("error").textContent = sentence;
  byId("error").hidden = !sentence;
}

function working(job) {
  return Boolean(job) && (job.state === "waiting" || job.state === "running");
}

function showModel(model) {
  const said = { loading: "is being loaded …", ready: "is ready.", failed: "is not there." };
  const reason = model.state === "failed" ? ` ${model.sentence}` : "";
  byId("model").textContent = `Model ${session.model} ${said[model.state]}${reason}`;
}

function showJob(job) {
  const busy = working(job);
  byId("progress").hidden = !busy;
  for (const id of ASKING) byId(id).disabled = busy;
  if (!busy) {
    if (job) complain(job.state === "failed" ? job.sentence : job.state === "cancelled" ? "Cancelled." : "");
    return;
  }
  complain("");
  const others = job.ahead === 1 ? "one request of somebody else" : `${job.ahead} requests of others`;
  byId("stage").textContent = job.state === "waiting" && job.ahead
    ? `Waiting for ${others} …`
    : `${job.stage || "Starting"} …`;
  if (job.total) {
    byId("bar").max = job.total;
    byId("bar").value = job.done;
  } else {
    byId("bar").removeAttribute("value");
  }
}

function showScore(score) {
  byId("found-score").hidden = !score;
  if (!score) return;
  const side = score.memorized ? "above" : "not above";
  const verdict = score.memorized ? "memorized" : "not memorized";
  byId("verdict").textContent =
    `“${score.caption}”: ${score.value.toFixed(3)}, ${side} the threshold ${score.threshold.toFixed(3)}: ${verdict}.`;
  byId("level").style.width = `${100 * Math.min(1, Math.max(0, score.value))}%`;
  byId("mark").style.left = `${100 * score.threshold}%`;
  byId("note").textContent = score.note;
}

function showNeurons(located) {
  byId("found-neurons").hidden = !located;
  if (!located) return;
  const none = located.count === 0;
  byId("neurons-said").textContent = none
    ? "The prompt is not memorized: there is nothing to locate."
    : `${located.count} of ${located.candidates} candidates are needed. With them off the score is ${located.score.toFixed(3)}. (${located.evaluations} evaluations)`;
  byId("layers").hidden = byId("export").hidden = none;
  const rows = located.neurons.flatMap((neurons, layer) => {
    if (!neurons.length) return [];
    const row = document.createElement("tr");
    for (const text of [layer, neurons.join(", ")]) {
      const cell = document.createElement("td");
      cell.textContent = text;
      row.append(cell);
    }
    return [row];
  });
  byId("layers").tBodies[0].replaceChildren(...rows);
  byId("csv").href = `/api/${session.name}/located_neurons.csv`;
}

function showPictures(pictures, running) {
  byId("found-pictures").hidden = !pictures;
  const key = JSON.stringify(pictures);
  // While a job runs the pictures may be about to change.
  if (!pictures || running || key + session.made === shownPictures) return;
  shownPictures = key + session.made;
  for (const kind of ["unblocked", "blocked"]) {
    const images = Array.from({ length: pictures[kind] }, (_, number) => {
      const image = document.createElement("img");
      image.src = `/api/${session.name}/${kind}/${number}.png?${session.made}`;
      image.alt = `${pictures.caption}, ${kind}, ${number + 1} of ${pictures[kind]}`;
      return image;
    });
    byId(kind).replaceChildren(...images);
  }
  byId("blocked-title").textContent = pictures.blocked
    ? `Located neurons times ${pictures.factor}`
    : "No neurons to switch off";
  byId("pictures-note").textContent = pictures.lost
    ? `${pictures.lost} pictures were not finite and are left out.`
    : "";
}

function showEdit(edit) {
  byId("diff").hidden = !edit;
  if (!edit) return;
  byId("diff").href = `/api/${session.name}/edit.safetensors`;
  byId("diff").textContent = `Download edit.safetensors (neurons times ${edit.factor})`;
}

function show(state) {
  showModel(state.model);
  showJob(state.job);
  showScore(state.score);
  showNeurons(state.located);
  showPictures(state.pictures, working(state.job));
  showEdit(state.edit);
  clearTimeout(timer);
  if (working(state.job) || state.model.state === "loading") timer = setTimeout(look, POLL);
}

async function look() {
  try {
    show(await send(`/api/${session.name}`));
  } catch (error) {
    if (error.status !== 404) {
      byId("model").textContent = error.message; // until a look succeeds
      timer = setTimeout(look, RETRY);
      return;
    }
    // The session is over: there is nothing more to look at.
    complain(error.message);
    byId("progress").hidden = true;
    for (const id of ASKING) byId(id).disabled = false;
  }
}

async function ask(what) {
  if (!session) return;
  if (what !== "cancel" && !byId("caption").value.trim()) {
    complain("Type a prompt first.");
    byId("caption").focus();
    return;
  }
  if (what === "pictures") session.made += 1;
  try {
    show(await send(`/api/${session.name}/${what}`, {
      caption: byId("caption").value,
      factor: byId("factor").valueAsNumber,
      samples: byId("samples").valueAsNumber,
      seed: byId("seed").valueAsNumber,
    }));
  } catch (error) {
    complain(error.message);
  }
}

async function enter() {
  try {
    session = { made: 0, ...(await send("/api", {})) };
  } catch (error) {
    byId("model").textContent = error.message;
    return;
  }
  for (const caption of session.examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = caption;
    button.addEventListener("click", () => { byId("caption").value = caption; });
    byId("examples").append(button);
  }
  byId("examples").hidden = session.examples.length === 0;
  await look();
}

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); ask("score"); });
byId("neurons").addEventListener("click", () => ask("neurons"));
byId("pictures").addEventListener("click", () => ask("pictures"));
byId("edit").addEventListener("click", () => ask("edit"));
byId("cancel").addEventListener("click", () => ask("cancel"));
byId("factor").addEventListener("input", () => { byId("factor-shown").textContent = byId("factor").value; });
enter();
