// The operator page: asks the service each second, shows what it says, and sends commands that a person answers for.

const PERIOD_MS = 1000;
const PATIENCE_MS = 3000;
const STALE_MS = 3500;
const SHOWN = 20;
const SVG = "http://www.w3.org/2000/svg";
const COMMANDS = {
  kill: {
    title: "Pull the kill switch?",
    words: "Trading is halted and stays so until somebody resets it. An open position is closed at the next decision.",
    confirm: "Halt trading",
    tone: "danger",
    done: "Trading is halted",
  },
  reduce_only: {
    title: "Allow smaller positions only?",
    words: "Until somebody resets it, the service holds or makes the position smaller.",
    confirm: "Reduce only",
    tone: "caution",
    done: "Only smaller positions are allowed",
  },
  reset: {
    title: "Trade again?",
    words: "Trading becomes ACTIVE, and the running peak, from which the drawdown is measured, starts anew at the newest equity.",
    confirm: "Reset",
    tone: "",
    done: "The trading state is reset",
  },
};

const $ = (id) => document.getElementById(id);
const rows = new Map();
let answeredAt = null;
let seenSeq = null;
let actions = [];
let command = null;

// --- asking ----------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(path, body) {
  const headers = {};
  const token = sessionStorage.getItem("detent-token");
  if (token) headers.authorization = `Bearer ${token}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal: AbortSignal.timeout(body === undefined ? PATIENCE_MS : 10 * PATIENCE_MS),
  });
  const answer = await response.json();
  if (!response.ok) throw new Refused(response.status, answer.error ?? response.statusText);
  return answer;
}

async function refresh() {
  try {
    const state = await ask("state");
    actions = state.actions;
    showState(state);
    // Nothing new is recorded without a new entry.
    if (state.ledger.seq !== seenSeq || state.ledger.error) {
      showDecisions(await ask(`decisions?limit=${SHOWN}`));
      seenSeq = state.ledger.seq;
    }
    answeredAt = Date.now();
    $("main").hidden = false;
    $("token-form").hidden = true;
    text($("connection"), `Version ${state.version}, answering`);
  } catch (error) {
    if (error instanceof Refused && [401, 403].includes(error.status)) askForToken(error.message);
    else text($("connection"), `No answer: ${error.message}`);
  }
  showStaleness();
}

async function poll() {
  await refresh();
  setTimeout(poll, PERIOD_MS);
}

function showStaleness() {
  const age = answeredAt === null ? null : Date.now() - answeredAt;
  const stale = age !== null && age > STALE_MS;
  document.body.classList.toggle("stale", stale);
  $("stale").hidden = !stale;
  // The words stay the same while it is stale, so that they are read out once.
  if (stale) {
    text($("stale"), `The service does not answer. What is shown is from ${clock(answeredAt / 1000)} and may be wrong.`);
    text($("connection"), `Last answer ${Math.round(age / 1000)} s ago`);
  }
}

function askForToken(words) {
  $("main").hidden = true;
  if ($("token-form").hidden) {
    $("token-form").hidden = false;
    $("token").focus();
  }
  const known = sessionStorage.getItem("detent-token") !== null;
  text($("token-hint"), known ? `Not accepted: ${words}.` : "The service asks for a token. It is kept until this tab is closed.");
  text($("connection"), "Not signed in");
  answeredAt = null;
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("detent-token", $("token").value.trim());
  $("token").value = "";
  refresh();
});

$("change-token").addEventListener("click", () => {
  sessionStorage.removeItem("detent-token");
  $("change-token").hidden = true;
  refresh();
});

// --- commands --------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-command]")) {
  button.addEventListener("click", () => {
    command = button.dataset.command;
    const said = COMMANDS[command];
    text($("dialog-title"), said.title);
    text($("dialog-words"), said.words);
    text($("confirm"), said.confirm);
    $("confirm").className = said.tone;
    text($("dialog-error"), "");
    $("person").value = sessionStorage.getItem("detent-person") ?? "";
    $("reason").value = "";
    $("dialog").showModal();
    ($("person").value ? $("reason") : $("person")).focus();
  });
}

$("cancel").addEventListener("click", () => $("dialog").close());

$("dialog-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const person = $("person").value.trim();
  const reason = $("reason").value.trim();
  $("confirm").disabled = true;
  text($("dialog-error"), "");
  try {
    const record = await ask(command, { person, reason });
    sessionStorage.setItem("detent-person", person);
    text($("outcome"), `${COMMANDS[command].done}, recorded at ${clock(record.time)} for ${record.person}.`);
    $("dialog").close();
    await refresh();
  } catch (error) {
    const words = error instanceof Refused ? error.message : "the service does not answer; whether it took the command is not known";
    text($("dialog-error"), `Not confirmed: ${words}.`);
  } finally {
    $("confirm").disabled = false;
  }
});

// --- showing ---------------------------------------------------------------------------------------------

function showState(state) {
  const risk = state.risk;
  text($("account"), state.ledger.account);
  text($("state"), state.killed ? `${state.trading_state}, kill switch latched` : state.trading_state);
  $("trading").dataset.state = state.trading_state;
  document.title = `${state.trading_state} – Detent`;
  $("change-token").hidden = sessionStorage.getItem("detent-token") === null;
  facts($("facts"), [
    ["Drawdown", percent(state.drawdown)],
    ["Equity", money(risk.equity)],
    ["Peak", money(risk.peak)],
    ["Newest decision", risk.decided_at ? `${duration(state.time - risk.decided_at)} ago` : "none"],
    ["Newest bar", risk.bar_time ? moment(risk.bar_time) : "none"],
    ["Ledger", state.ledger.error || `${state.ledger.seq} entries, ${short(state.ledger.hash)}`],
    ["Running for", duration(state.time - state.started_at)],
  ]);
  facts($("champion"), bundle("Champion", state.bundle));
  const { equal, compared } = state.agreement;
  const agreement = compared ? `${percent(equal / compared)} of ${compared} decisions` : "nothing compared yet";
  facts($("challenger"), state.challenger ? [...bundle("Challenger", state.challenger), ["Agreement", agreement]] : [["Challenger", "none"]]);
  $("drift").className = state.drift === null ? "soft" : { ok: "good", warning: "warn", alarm: "bad" }[state.drift.level];
  text($("drift"), state.drift === null ? "Drift is not watched." : `Drift, ${state.drift.level}: ${state.drift.words}.`);
  showLatency(state.latency);
}

function bundle(part, found) {
  return [
    [part, short(found.hash), found.hash],
    ["Rules", short(found.rule_set_hash), found.rule_set_hash],
    ["Planner", found.planner ? "yes" : "no"],
    ["Commit", short(found.git_commit), found.git_commit],
  ];
}

function showDecisions(decisions) {
  const body = $("decisions").tBodies[0];
  const shown = new Set(decisions.map((decision) => decision.event_id));
  for (const [event, row] of rows) {
    if (!shown.has(event)) {
      row.remove();
      rows.delete(event);
    }
  }
  // Rows that are there stay as they are: somebody may be reading their details.
  for (const decision of [...decisions].reverse()) {
    if (!rows.has(decision.event_id)) {
      const row = decisionRow(decision);
      rows.set(decision.event_id, row);
      body.prepend(row);
    }
  }
  $("decisions").hidden = decisions.length === 0;
  $("no-decisions").hidden = decisions.length > 0;
}

function decisionRow(decision) {
  const row = element("tr");
  const cells = [
    ["Time", element("time", clock(decision.time))],
    ["Event", element("div", decision.event_id)],
    ["Decision", outcome(decision)],
    ["Why", why(decision)],
    ["Actions", masks(decision)],
    ["Latency", element("div", `${((decision.latency_us.total ?? 0) / 1000).toFixed(2)} ms`, "number")],
  ];
  cells[0][1].title = moment(decision.time);
  row.role = "row";
  for (const [label, content] of cells) {
    const cell = element(label === "Event" ? "th" : "td");
    // As cards on a small screen they would be no cells otherwise.
    cell.role = label === "Event" ? "rowheader" : "cell";
    cell.dataset.label = label;
    cell.append(content);
    row.append(cell);
  }
  return row;
}

function outcome(decision) {
  const cell = element("div");
  cell.append(element("strong", decision.flatten ? "close position" : name(decision.executed)));
  if (decision.executed !== decision.proposed) cell.append(element("span", `proposed ${name(decision.proposed)}`, "soft block"));
  return cell;
}

function why(decision) {
  const cell = element("div");
  cell.append(element("span", decision.reason.replaceAll("_", " "), decision.reason === "ok" ? "tag good" : "tag warn"));
  if (decision.source !== "hold") cell.append(` by ${decision.source}`);
  if (decision.detail) cell.append(element("span", decision.detail, "soft block"));
  return cell;
}

function masks(decision) {
  const cell = element("div");
  const list = element("ul", "", "masks");
  const denied = [];
  decision.action_masks.forEach((valid, action) => {
    const item = element("li", `${valid ? "✓" : "✕"} ${name(action)}`, valid ? "valid" : "denied");
    item.append(element("span", valid ? " valid" : " denied", "hidden"));
    if (action === decision.executed) item.classList.add("chosen");
    list.append(item);
    if (!valid) denied.push(`${name(action)}: ${deniers(decision, action).join(", ")}`);
  });
  cell.append(list);
  if (denied.length) {
    const more = element("details");
    more.append(element("summary", `${denied.length} denied, why`));
    const reasons = element("ul");
    reasons.append(...denied.map((reason) => element("li", reason)));
    more.append(reasons);
    cell.append(more);
  }
  return cell;
}

function deniers(decision, action) {
  const found = Object.keys(decision.blocked).filter((rule) => decision.blocked[rule].includes(action));
  if (decision.caller_masks && !decision.caller_masks[action]) found.push("caller");
  if (found.length) return found;
  return [decision.state ? "trading state" : "the request cannot be judged"];
}

function showLatency({ upper_ms: upper, counts }) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const picture = $("latency");
  picture.toggleAttribute("hidden", total === 0);
  if (total === 0) return;
  text($("latency-words"), `${total} decisions: median ${quantile(upper, counts, total, 0.5)}, 99th percentile ${quantile(upper, counts, total, 0.99)}.`);
  const [width, height, foot] = [640, 230, 40];
  const step = width / counts.length;
  const most = Math.max(...counts);
  const parts = [];
  counts.forEach((count, index) => {
    const size = ((height - foot - 18) * count) / most;
    const left = index * step;
    const label = index < upper.length ? `≤ ${upper[index]} ms` : `> ${upper.at(-1)} ms`;
    const bar = shape("rect", { x: left + 3, y: height - foot - size, width: step - 6, height: size, class: "bar" });
    const title = shape("title", {});
    title.textContent = `${label}: ${count}`;
    bar.append(title);
    parts.push(bar);
    if (count) parts.push(labelAt(left + step / 2, height - foot - size - 5, String(count)));
    parts.push(labelAt(left + step / 2, height - foot + 16, index < upper.length ? String(upper[index]) : "more"));
  });
  parts.push(shape("line", { x1: 0, x2: width, y1: height - foot, y2: height - foot, class: "axis" }));
  parts.push(labelAt(width / 2, height - 4, "up to, in ms"));
  picture.replaceChildren(...parts);
}

function quantile(upper, counts, total, share) {
  let sum = 0;
  for (let index = 0; index < upper.length; index += 1) {
    sum += counts[index];
    if (sum >= share * total) return `≤ ${upper[index]} ms`;
  }
  return `> ${upper.at(-1)} ms`;
}

// --- small parts -----------------------------------------------------------------------------------------

function text(node, words) {
  // Unchanged words are not read out again.
  if (node.textContent !== words) node.textContent = words;
}

function element(kind, words = "", names = "") {
  const node = document.createElement(kind);
  node.textContent = words;
  if (names) node.className = names;
  return node;
}

function shape(kind, attributes) {
  const node = document.createElementNS(SVG, kind);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function labelAt(x, y, words) {
  const node = shape("text", { x, y, "text-anchor": "middle" });
  node.textContent = words;
  return node;
}

function facts(list, entries) {
  while (list.children.length > entries.length) list.lastElementChild.remove();
  entries.forEach(([term, value, title], index) => {
    let pair = list.children[index];
    if (!pair) {
      pair = element("div");
      pair.append(element("dt"), element("dd"));
      list.append(pair);
    }
    text(pair.firstElementChild, term);
    text(pair.lastElementChild, value);
    pair.lastElementChild.title = title ?? "";
  });
}

const name = (action) => actions[action] ?? `action ${action}`;
const short = (hash) => (hash ? hash.slice(0, 12) : "none");
const percent = (share) => `${(100 * share).toFixed(2)} %`;
const money = (value) => value.toLocaleString(undefined, { maximumFractionDigits: 2 });
const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString();
const moment = (seconds) => new Date(1000 * seconds).toLocaleString();

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.round(whole / 60)} min`;
  return whole < 172800 ? `${Math.round(whole / 3600)} h` : `${Math.round(whole / 86400)} days`;
}

poll();
