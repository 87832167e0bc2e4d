
"use strict";
// The page is drawn from the data alone. Text of unknown content only ever becomes a text node.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const EDGES = [0.02, 0.1, 0.3, 1, 3];
  const SHOWN_EXAMPLES = 5;
  const MEAN = -1;
  const $ = (id) => document.getElementById(id);

  // -- elements and numbers ---------------------------------------------------------------------------------------

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  function drawing(width, height, label, ...shapes) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    const attributes = { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label };
    for (const [name, value] of Object.entries(attributes)) svg.setAttribute(name, value);
    for (const [className, path] of shapes) {
      const shape = document.createElementNS(space, "path");
      shape.setAttribute("class", className);
      shape.setAttribute("d", path);
      svg.append(shape);
    }
    return svg;
  }

  const known = (value) => typeof value === "number";
  const minus = (text) => text.replace("-", "−");
  const plain = (value, digits = 2) => (known(value) ? minus(value.toFixed(digits)) : "–");
  function signed(value, digits = 2) {
    if (!known(value)) return "–";
    const text = Math.abs(value).toFixed(digits);
    return Number(text) === 0 ? text : (value > 0 ? "+" : "−") + text;
  }
  function percent(share) {
    if (!known(share)) return "–";
    if (share >= 0.9995) return "100 %";
    return share >= 0.001 ? `${(100 * share).toFixed(1)} %` : "< 0.1 %";
  }
  const count = (number) => number.toLocaleString("en-US");
  function mean(values) {
    const all = values.filter(known);
    return all.length ? all.reduce((sum, value) => sum + value, 0) / all.length : null;
  }
  const difference = (one, other) => (known(one) && known(other) ? one - other : null);

  function colour(gain) {
    if (!known(gain)) return "";
    const level = EDGES.filter((edge) => Math.abs(gain) >= edge).length;
    return level ? (gain > 0 ? "g" : "l") + level : "";
  }

  // -- text of unknown content ------------------------------------------------------------------------------------

  const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u;
  const SYMBOLS = { "\n": "↵", "\t": "⇥" };
  const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

  function stand(className, text, title) {
    const made = element("i", className, text);
    if (title) made.title = title;
    return made;
  }

  // A token's text as nodes. `inText`: line ends also end the line, only spaces without a word are marked, and marks
  // sit on the token before, where that is a character.
  function visible(text, inText = false, afterCharacter = true) {
    if (Array.isArray(text)) {
      const bytes = text.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
      const title = `${bytes}: a part of a character`;
      return [inText ? stand("space", "▫", title) : stand("hidden", `⟨${bytes}⟩`, title)];
    }
    const nodes = [];
    const blank = /^\s*$/u.test(text);
    const marked = (index) => blank || (!inText && (index === 0 || index === text.length - 1));
    let seen = "";
    const flush = () => {
      if (seen) nodes.push(seen);
      seen = "";
    };
    // a mark that has nothing to sit on would sit on our own words
    if (!(inText && afterCharacter) && /^\p{M}/u.test(text)) seen = "◌";
    let index = 0;
    for (const character of text) {
      if (/\p{Zs}/u.test(character) && marked(index)) {
        flush();
        nodes.push(stand("space", "·", codePoint(character)));
        if (inText) nodes.push(document.createElement("wbr"));
      } else if (UNSEEN.test(character)) {
        flush();
        const symbol = SYMBOLS[character];
        nodes.push(stand(symbol ? "space" : "hidden", symbol ?? `⟨${codePoint(character)}⟩`, codePoint(character)));
        if (inText && symbol) nodes.push(character);
      } else {
        seen += character;
      }
      index += character.length;
    }
    flush();
    return nodes;
  }

  const tokens = data.text.tokens;
  const wordOf = (id) => data.vocabulary[id] ?? `⟨${id}⟩`;
  const pieceAt = (index) => data.text.pieces[index] ?? wordOf(tokens[index]);
  const isolated = (text) => element("bdi", "", ...visible(text));

  // -- what was measured ------------------------------------------------------------------------------------------

  const places = new Array(tokens.length).fill(null);
  for (const position of data.positions) {
    position.gain = mean(position.thoughts.map((thought) => difference(thought.talk[0], position.base[0])));
    position.weight = mean(position.thoughts.map((thought) => thought.weight));
    places[position.token] = position;
  }
  const indices = data.positions.map((position) => position.token);
  const gains = data.positions.map((position) => position.gain);

  // -- head of the page -------------------------------------------------------------------------------------------

  function drawHead() {
    const { model, settings, text } = data;
    $("title").append(isolated(data.title));
    const kind = model.thinking === "pause" ? "pause" : settings.temperature === null ? "greedy thought" : "thought";
    const many = settings.thoughts === 1 ? `one ${kind}` : `${settings.thoughts} ${kind}s`;
    const heat = settings.temperature === null || model.thinking === "pause" ? "" : ` at temperature ${settings.temperature}`;
    $("lede").append(
      `${count(tokens.length)} tokens, ${count(indices.length)} of them predicted after ${many} of ` +
        `${model.thought_length} tokens${heat}, each measured on ${model.lookahead} ` +
        `token${model.lookahead === 1 ? "" : "s"} of what follows; ${model.family}, seed ${settings.seed}.`,
    );
    const notes = [];
    if (text.cut) notes.push(`The text goes on: only its first ${count(tokens.length)} tokens are shown.`);
    if (settings.overlap) {
      notes.push(
        `Longer than what the model reads at once: worked through in windows of ${settings.window} tokens, in which ` +
          `each position has at least ${settings.overlap} tokens of text before it.`,
      );
    }
    if (settings.positions !== "all") notes.push(`Only some positions think: ${settings.positions}.`);
    $("notes").append(...notes.map((note) => element("li", "", note)));
    const without = mean(data.positions.map((position) => position.base[0]));
    const after = difference(without, 0) === null ? null : without + mean(gains);
    const figures = [
      ["Mean gain of thinking", signed(mean(gains), 3), "nats a token"],
      ["NLL without → with thought", `${plain(-without, 3)} → ${plain(-after, 3)}`, ""],
      ["Helped by more than 0.1", percent(gains.filter((gain) => gain > 0.1).length / gains.length), "of tokens"],
      ["Harmed by more than 0.1", percent(gains.filter((gain) => gain < -0.1).length / gains.length), "of tokens"],
      ["Mean weight w", plain(mean(data.positions.map((position) => position.weight)), 3), ""],
    ];
    for (const [name, value, small] of figures) {
      $("figures").append(
        element("div", "", element("dt", "", name), element("dd", "", `${value} `, element("small", "", small))),
      );
    }
    const git = data.environment.git;
    const code = git ? ` at commit ${git.commit.slice(0, 10)}${git.dirty ? " and changes" : ""}` : "";
    const versions = ["quietstar", "torch", "transformers"].map((name) => `${name} ${data.environment.packages[name] ?? "–"}`);
    $("footer").append(
      `Written by ${versions.join(", ")}${code}; ${settings.dtype} on ${settings.device}. The same data lies beside ` +
        `this page as JSON (version ${data.version}).`,
    );
  }

  function drawLegend() {
    const scale = element("div", "scale");
    scale.setAttribute("role", "img");
    scale.setAttribute("aria-label", `Orange: losses above ${EDGES.join(", ")} nats; blue: gains above the same.`);
    const levels = [...EDGES.keys()].map((level) => level + 1);
    const swatches = [...levels.toReversed().map((level) => `l${level}`), "", ...levels.map((level) => `g${level}`)];
    const borders = [...EDGES.toReversed().map((edge) => -edge), ...EDGES];
    swatches.forEach((className, index) => {
      const label = index < borders.length ? minus(String(borders[index]).replace("0.", ".")) : "";
      scale.append(element("span", className, element("i", "", label)));
    });
    const of = data.settings.thoughts > 1 ? `, mean of its ${data.settings.thoughts} thoughts` : "";
    $("legend").append(
      scale,
      element(
        "p",
        "",
        `Colour of a token: what thinking before it gained in predicting it, log p with thought − log p without, in ` +
          `nats${of}. Blue: more probable (+1 is 2.7 times), orange: less, none: less than ${EDGES[0]} either way.`,
      ),
    );
  }

  function drawStrip() {
    const width = tokens.length;
    const top = Math.max(0, ...gains.filter(known));
    const bottom = Math.min(0, ...gains.filter(known));
    const scale = 62 / (top - bottom || 1);
    const zero = 1 + top * scale;
    const thick = Math.max(1, width / 400); // thinner bars would fade
    const bars = (wanted) =>
      data.positions
        .filter((position) => known(position.gain) && wanted(position.gain))
        .map((position) => `M${(position.token + 0.5 - thick / 2).toFixed(1)} ${zero.toFixed(1)}h${thick}v${(-position.gain * scale).toFixed(2)}h-${thick}z`)
        .join("");
    const label = `Gain of each token, from ${signed(bottom)} to ${signed(top)} nats`;
    $("strip").prepend(
      drawing(
        width,
        64,
        label,
        ["zero", `M0 ${zero - 0.4}h${width}v.8h-${width}z`],
        ["up", bars((gain) => gain > 0)],
        ["down", bars((gain) => gain < 0)],
      ),
    );
    $("strip").after(
      element("div", "axis", element("span", "", "token 0"), element("span", "", `${signed(bottom)} to ${signed(top)} nats`), element("span", "", String(width - 1))),
    );
    $("strip").addEventListener("click", (event) => {
      const box = $("strip").getBoundingClientRect();
      const wanted = ((event.clientX - box.left) / box.width) * width - 0.5;
      const nearest = indices.reduce((best, index) => (Math.abs(index - wanted) < Math.abs(best - wanted) ? index : best), indices[0]);
      select(nearest, { scroll: "center" });
    });
  }

  function drawHistogram() {
    const weights = data.positions.map((position) => position.weight).filter(known);
    if (!weights.length) return;
    const bins = 30;
    const low = Math.min(0, ...weights);
    const high = Math.max(1, ...weights);
    const counts = new Array(bins).fill(0);
    for (const weight of weights) counts[Math.min(bins - 1, Math.floor(((weight - low) / (high - low)) * bins))] += 1;
    const most = Math.max(...counts);
    const path = counts.map((number, bin) => `M${bin + 0.06} 64h.88v${-(62 * number) / most}h-.88z`).join("");
    $("histogram").append(
      drawing(bins, 64, `Histogram of the mixing weight, from ${plain(low)} to ${plain(high)}`, ["zero", `M0 63.2h${bins}v.8h-${bins}z`], ["count", path]),
      element("div", "axis", element("span", "", plain(low)), element("span", "", `most: ${count(most)} tokens`), element("span", "", plain(high))),
    );
  }

  function drawExamples() {
    const best = data.positions.flatMap((position) => {
      const rewarded = position.thoughts.filter((thought) => known(thought.reward));
      return rewarded.map((thought) => ({ position, thought }));
    });
    best.sort((one, other) => other.thought.reward - one.thought.reward);
    const listed = (candidates) => {
      const taken = new Set();
      return candidates.filter(({ position }) => !taken.has(position) && taken.add(position)).slice(0, SHOWN_EXAMPLES);
    };
    const line = ({ position, thought }) => {
      const link = element("a", "");
      link.href = `#pos=${position.token}`;
      const before = element("bdi", "");
      for (let index = Math.max(0, position.token - 10); index < position.token; index += 1) before.append(...visible(pieceAt(index), true));
      const target = element("b", "", isolated(pieceAt(position.token)));
      link.append(
        element("span", `value ${thought.reward < 0 ? "worse" : "better"}`, signed(thought.reward)),
        element("span", "where", before, target),
        element("span", "where muted", ...said(thought)),
      );
      return element("li", "", link);
    };
    $("best").append(...listed(best.filter(({ thought }) => thought.reward > 0)).map(line));
    $("worst").append(...listed(best.filter(({ thought }) => thought.reward < 0).reverse()).map(line));
  }

  function said(thought) {
    if (!thought.tokens) return ["pause"];
    return thought.tokens.map((id) => element("bdi", "piece", ...visible(wordOf(id))));
  }

  // -- the text ---------------------------------------------------------------------------------------------------

  const spans = [];
  function drawText() {
    const text = $("text");
    let line = element("div", "");
    const lines = [line];
    line.setAttribute("role", "presentation");
    let longest = 0;
    let length = 0;
    tokens.forEach((_, index) => {
      const piece = pieceAt(index);
      const span = element("span", `t ${colour(places[index]?.gain)}`, ...visible(piece, true, index > 0 && !Array.isArray(pieceAt(index - 1))));
      span.id = `t${index}`;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      spans.push(span);
      line.append(span);
      length += Array.isArray(piece) ? 4 * piece.length : piece.length;
      longest = Math.max(longest, length);
      if (typeof piece === "string" && piece.endsWith("\n")) {
        line = element("div", "");
        line.setAttribute("role", "presentation");
        lines.push(line);
        length = 0;
      }
    });
    if (!line.hasChildNodes()) lines.pop();
    // many short lines side by side: else 2,000 tokens of sums would be a column of 200 lines
    if (lines.length > 20 && longest <= 24) {
      text.classList.add("short");
      text.style.setProperty("--longest", `${longest + 2}ch`);
    }
    text.append(...lines);
    const indexOf = (event) => {
      const span = event.target.closest?.(".t");
      return span ? Number(span.id.slice(1)) : null;
    };
    text.addEventListener("click", (event) => {
      const index = indexOf(event);
      if (index !== null) select(index, {});
    });
    text.addEventListener("pointerover", (event) => {
      const index = event.pointerType === "mouse" ? indexOf(event) : null;
      if (index !== null) drawPanel(index);
    });
    text.addEventListener("pointerleave", () => drawPanel(selected));
  }

  // -- the panel --------------------------------------------------------------------------------------------------

  let selected = 0;
  let shown = null;
  let chosen = data.settings.thoughts > 1 ? MEAN : 0;

  function drawPanel(index, force = false) {
    if (index === shown && !force) return;
    shown = index;
    const position = places[index];
    const heading = element("h2", "", isolated(pieceAt(index)), element("span", "muted", `token ${index} of 0–${tokens.length - 1}`));
    const panel = $("panel");
    const kept = panel.scrollTop;
    panel.replaceChildren(heading, context(index), ...(position ? about(position) : [nothing(index)]));
    if (kept) panel.scrollTop = kept;
  }

  function context(index) {
    const before = element("bdi", "");
    for (let at = Math.max(0, index - 12); at < index; at += 1) before.append(...visible(pieceAt(at), true));
    return element("p", "context", index > 12 ? "…" : "", before, element("b", "", isolated(pieceAt(index))));
  }

  function nothing(index) {
    const why = index === 0 ? "Nothing stands before the first token, so there is no prediction of it." : `There is no thought before this token (positions: ${data.settings.positions}).`;
    return element("p", "empty", why);
  }

  function about(position) {
    const target = tokens[position.token];
    const after = mean(position.thoughts.map((thought) => thought.talk[0]));
    const verdict = element(
      "p",
      "verdict",
      element("span", "", "gain ", element("b", tone(position.gain), signed(position.gain, 3)), " nats"),
      element("span", "", `log p ${plain(position.base[0])} → ${plain(after)}`),
      element("span", "", `w ${plain(position.weight)}`),
    );
    const pick = position.thoughts[chosen] ?? null;
    const now = pick ? pick.after : (position.mean ?? position.thoughts[0].after);
    const talk = pick ? Math.exp(pick.talk[0]) : mean(position.thoughts.map((thought) => Math.exp(thought.talk[0])));
    const name = pick ? (position.thoughts.length > 1 ? `after thought ${chosen + 1}` : "after the thought") : "mean of the thoughts";
    const several = position.thoughts.length > 1;
    return [
      verdict,
      element("h3", "", several ? "Thoughts before this token" : "Thought before this token", several ? hint("choose one; 0: their mean") : ""),
      ...position.thoughts.map((thought, number) => card(thought, number, several)),
      element("h3", "", "Next token", hint("most probable first")),
      element(
        "div",
        "lists",
        element("p", "small", "without thought"),
        element("p", "small", name),
        probabilities(position.before, target, Math.exp(position.base[0])),
        probabilities(now, target, talk),
      ),
      ...(data.model.interpolation === "log_probs" ? [element("p", "small", "This model mixes log-probabilities: what it gives after a thought does not sum to one.")] : []),
      element("h3", "", "How the text goes on", hint("log p in nats")),
      followed(position),
    ];
  }

  function card(thought, number, several) {
    const words = element("div", "said", element("span", "chip", "START"), " ");
    if (thought.tokens) words.append(...said(thought));
    else words.append(element("span", "muted", `${data.model.thought_length} pauses`));
    words.append(" ", element("span", "chip", "END"));
    const facts = element("div", "facts", fact("reward", signed(thought.reward), "what it gained on the tokens that follow, summed, in nats"));
    if (several) facts.append(fact("vs mean", signed(thought.advantage), "the reward less the mean of this token's thoughts"));
    facts.append(fact("w", plain(thought.weight), "weight of the thought in the prediction of this token"));
    if (thought.tokens) facts.append(fact("log p", plain(thought.logprob), "of the thought itself, at the temperature that it was sampled at"));
    const button = element("button", "thought", words, facts);
    button.type = "button";
    button.dataset.thought = number;
    button.setAttribute("aria-pressed", String(number === chosen));
    return button;
  }

  const hint = (text) => element("span", "hint", ` ${text}`);
  const tone = (gain) => (Math.abs(gain ?? 0) < 0.0005 ? "" : gain < 0 ? "worse" : "better");
  function fact(name, value, title) {
    const made = element("span", "", `${name} `, element("b", "", value));
    made.title = title;
    return made;
  }

  function probabilities(listed, target, share) {
    const list = element("ol", "list");
    const line = (id, probability, className) => {
      const item = element("li", className, isolated(wordOf(id)), element("span", "", percent(probability)));
      item.style.setProperty("--share", `${Math.min(100, 100 * (probability ?? 0)).toFixed(1)}%`);
      if (className) item.title = "the token that follows in the text";
      list.append(item);
    };
    for (const [id, probability] of listed) line(id, probability, id === target ? "true" : "");
    if (!listed.some(([id]) => id === target)) line(target, share, "true outside");
    return list;
  }

  function followed(position) {
    const head = element("tr", "", element("th", "", "token"), element("th", "", "without"));
    position.thoughts.forEach((_, number) => head.append(element("th", "", position.thoughts.length > 1 ? `with ${number + 1}` : "with")));
    const body = element("tbody", "");
    position.base.forEach((without, ahead) => {
      const row = element("tr", "", element("td", "", isolated(pieceAt(position.token + ahead))), element("td", "", plain(without)));
      for (const thought of position.thoughts) {
        row.append(element("td", colour(difference(thought.talk[ahead], without)), plain(thought.talk[ahead])));
      }
      body.append(row);
    });
    const sum = element("tr", "", element("td", "muted", "reward"), element("td", "", ""));
    for (const thought of position.thoughts) sum.append(element("td", "", signed(thought.reward)));
    body.append(sum);
    return element("table", "", element("thead", "", head), body);
  }

  $("panel").addEventListener("click", (event) => {
    const button = event.target.closest("[data-thought]");
    if (button) choose(Number(button.dataset.thought));
  });

  function choose(number) {
    if (number >= data.settings.thoughts) return;
    const several = data.settings.thoughts > 1;
    chosen = several && (number < 0 || number === chosen) ? MEAN : Math.max(0, number);
    const focused = document.activeElement?.dataset?.thought;
    drawPanel(shown, true);
    if (focused !== undefined) document.querySelector(`[data-thought="${focused}"]`)?.focus();
  }

  // -- moving -----------------------------------------------------------------------------------------------------

  let addressTimer = 0;
  function select(index, { scroll = "nearest", address = true } = {}) {
    const wanted = Math.max(0, Math.min(tokens.length - 1, index));
    drawPanel(wanted); // first: it reads the layout, which the rest changes
    const ahead = (token) => Math.min(tokens.length, token + (places[token]?.base.length ?? 1));
    for (let at = selected; at < ahead(selected); at += 1) spans[at].classList.remove("ahead");
    spans[selected].classList.remove("selected");
    spans[selected].setAttribute("aria-selected", "false");
    selected = wanted;
    for (let at = selected + 1; at < ahead(selected); at += 1) spans[at].classList.add("ahead");
    const span = spans[selected];
    span.classList.add("selected");
    span.setAttribute("aria-selected", "true");
    $("text").setAttribute("aria-activedescendant", span.id);
    $("mark").style.left = `${(100 * (selected + 0.5)) / tokens.length}%`;
    drawMatches();
    if (scroll) span.scrollIntoView({ block: scroll, inline: "nearest" });
    const gain = places[selected]?.gain;
    $("spoken").textContent = `token ${selected}, ${known(gain) ? `gain ${signed(gain)}` : "no thought"}`;
    if (address) {
      // browsers refuse addresses that change too often, as they would under a held key
      clearTimeout(addressTimer);
      addressTimer = setTimeout(() => history.replaceState(null, "", `#pos=${selected}`), 120);
    }
  }

  function vertical(direction) {
    const middle = (box) => (box.left + box.right) / 2;
    const start = spans[selected].getBoundingClientRect();
    const across = middle(start);
    let best = null;
    let line = null;
    for (let index = selected + direction; index >= 0 && index < spans.length; index += direction) {
      const box = spans[index].getBoundingClientRect();
      if (Math.abs(box.top - start.top) < start.height / 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > start.height / 2) break;
      const distance = Math.abs(middle(box) - across);
      if (best === null || distance < best.distance) best = { index, distance };
    }
    if (best) select(best.index);
  }

  function fromAddress() {
    const found = /^#pos=(\d{1,9})$/.exec(location.hash);
    return found ? Number(found[1]) : null;
  }

  // -- marking ----------------------------------------------------------------------------------------------------

  let matches = indices;
  function mark() {
    const kind = $("filter").value;
    const amount = Number($("amount").value);
    const ranked = (sign) =>
      data.positions
        .filter((position) => known(position.gain) && sign * position.gain > 0)
        .sort((one, other) => sign * (other.gain - one.gain))
        .slice(0, Math.max(0, Math.floor(amount)));
    const found = {
      all: () => data.positions,
      gain: () => ranked(1),
      loss: () => ranked(-1),
      weight: () => data.positions.filter((position) => known(position.weight) && position.weight > amount),
    }[kind]();
    matches = found.map((position) => position.token).sort((one, other) => one - other);
    const marked = new Set(kind === "all" ? [] : matches);
    spans.forEach((span, index) => span.classList.toggle("match", marked.has(index)));
    $("text").classList.toggle("filtered", kind !== "all");
    drawMatches();
  }

  function drawMatches() {
    const place = matches.indexOf(selected);
    $("matches").textContent = place >= 0 ? `${count(place + 1)} of ${count(matches.length)}` : `${count(matches.length)} marked`;
    $("previous").disabled = $("next").disabled = matches.length === 0;
  }

  function toMatch(direction) {
    if (!matches.length) return;
    const next = direction > 0 ? matches.find((index) => index > selected) : matches.findLast((index) => index < selected);
    select(next ?? (direction > 0 ? matches[0] : matches.at(-1)));
  }

  $("filter").addEventListener("change", () => {
    const kind = $("filter").value;
    $("amount").hidden = kind === "all";
    Object.assign($("amount"), kind === "weight" ? { value: "0.5", step: "0.05", min: "" } : { value: "20", step: "1", min: "1" });
    mark();
    if (kind !== "all" && matches.length && !matches.includes(selected)) toMatch(1);
  });
  $("amount").addEventListener("input", mark);
  $("previous").addEventListener("click", () => toMatch(-1));
  $("next").addEventListener("click", () => toMatch(1));

  // -- keys, address, theme ---------------------------------------------------------------------------------------

  const KEYS = {
    ArrowLeft: () => select(selected - 1),
    ArrowRight: () => select(selected + 1),
    ArrowUp: () => vertical(-1),
    ArrowDown: () => vertical(1),
    Home: () => select(0),
    End: () => select(tokens.length - 1),
    n: () => toMatch(1),
    p: () => toMatch(-1),
    0: () => choose(MEAN),
  };
  for (let number = 1; number <= 9; number += 1) KEYS[number] = () => choose(number - 1);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest?.("input, select, .panel:focus")) return;
    const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  addEventListener("hashchange", () => {
    const index = fromAddress();
    if (index !== null) select(index, { scroll: "center", address: false });
  });

  const THEMES = ["auto", "light", "dark"];
  $("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? "auto";
    const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    $("theme").textContent = `Theme: ${next}`;
  });

  drawHead();
  drawLegend();
  drawText();
  drawStrip();
  drawHistogram();
  drawExamples();
  $("examples").open = innerWidth >= 992;
  const asked = fromAddress();
  const best = data.positions.reduce((top, position) => (!top || position.gain > top.gain ? position : top), null);
  select(asked ?? best?.token ?? 0, { scroll: asked === null ? null : "center", address: false });
})();
