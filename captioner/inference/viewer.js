// The attention viewer: draws one caption with its maps and lets the visitor explore it.
// Knows nothing of Gradio or of a server. Text from the value is set as text, never as HTML.
//
// mountViewer(root, { rewrite, explain, changed, selected }) returns
// { show(value), explained(caption), state(), text(), chosen(), percent }.
//   value: { photo: { url }, caption: Caption.to_dict(), beam, word, appearance }
//   rewrite({ text, given, whole }): requests a caption that begins with `text`; without it the
//     alternatives cannot be clicked.
//   explain(beam): requests the words' verdicts and further maps; the answer goes to explained().
//   changed(): called when the visitor chose another caption, word or appearance.
//   selected(): called when other cells, or none, are selected.
//   chosen(): the chosen word's place and label, its map as it is shown, and the selected cells.
function mountViewer(root, { rewrite, explain, changed = () => {}, selected: selectionChanged = () => {} } = {}) {
  const find = (selector) => root.querySelector(selector);
  const make = (name, className, ...children) => {
    const node = Object.assign(document.createElement(name), { className });
    node.append(...children);
    return node;
  };
  const button = (className, onClick, ...children) => {
    const node = Object.assign(make("button", className, ...children), { type: "button" });
    node.addEventListener("click", onClick);
    return node;
  };
  // Presses one of the buttons in a container and releases the others.
  const press = (selector, chosen) => [...find(selector).children].forEach((node, at) => (node.ariaPressed = String(at === chosen)));
  const clamp = (number, low, high) => Math.min(Math.max(number, low), high);
  const percent = (share) => (share >= 0.0995 ? `${Math.round(share * 100)}%` : `${(share * 100).toFixed(1)}%`);
  const signed = (number) => number.toFixed(2).replace("-", "−");
  const nats = (number) => (number > 0 ? "+" : "") + (Math.abs(number) < 0.1 ? String(Number(number.toPrecision(1))).replace("-", "−") : signed(number));

  // ---- Colors: 17 points of each of matplotlib's maps, interpolated linearly by the browser.
  const COLORS = {
    inferno: "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4",
    viridis: "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
    cividis: "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
    light: "000000 ffffff",
  };
  const NAMES = { light: "brightness only" }; // of the others the key is the name
  const pointsOf = (name) => COLORS[name].split(" ").map((hex) => `#${hex}`);
  const tables = Object.fromEntries(Object.keys(COLORS).map((name) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 256, height: 1 });
    const context = canvas.getContext("2d");
    const gradient = context.createLinearGradient(0.5, 0, 255.5, 0);
    pointsOf(name).forEach((color, at, all) => gradient.addColorStop(at / (all.length - 1), color));
    context.fillStyle = gradient;
    context.fillRect(0, 0, 256, 1);
    return [name, context.getImageData(0, 0, 256, 1).data];
  }));

  // ---- A map: its cells, scaled to 0..1, as an image that is laid over the photo.
  const FINE = 112;
  const cubic = (x) => {
    const d = Math.abs(x);
    if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
    return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
  };
  // Each cell is an area with its value at its center; beyond the edge the outermost cell continues.
  const resampling = (cells) =>
    Array.from({ length: FINE }, (_, pixel) => {
      const position = ((pixel + 0.5) * cells) / FINE - 0.5;
      const row = new Array(cells).fill(0);
      for (let at = Math.floor(position) - 1; at <= Math.floor(position) + 2; at++) row[clamp(at, 0, cells - 1)] += cubic(position - at);
      return row;
    });
  const multiply = (a, b) => a.map((row) => b[0].map((_, column) => row.reduce((sum, value, k) => sum + value * b[k][column], 0)));
  const transpose = (a) => a[0].map((_, column) => a.map((row) => row[column]));
  const smooth = (cells) => multiply(multiply(resampling(cells.length), cells), transpose(resampling(cells[0].length)));

  // ---- The maps of a word.
  const MAPS = {
    evidence: ["Evidence", "what each cell gave to the word through its detector or its class’s name, in nats (+0.7 doubles the odds)"],
    attended: ["Attended", "where the model looked before it wrote the word: shares of its attention"],
    mattered: ["Mattered", "how far the word’s log-probability falls without the cell, in nats"],
    shown: ["Shown", "where the word’s detector sees it, whatever the model did: probability per cell"],
  };
  const VERDICTS = {
    "seen there": ["●", "Seen there", "its evidence and what mattered lie in the same place."],
    "from the scene": ["◐", "From the scene", "the photo made it likelier, but no place in particular."],
    "from the sentence": ["○", "From the sentence", "the words before explain most of it."],
    guessed: ["?", "Guessed", "neither a detector nor a class’s name recognizes it in the photo."],
  };
  const DEFAULTS = { map: "evidence", special: false, strength: 0.75, shape: "smooth", colors: "inferno", scale: "word" };
  const appearance = { ...DEFAULTS };

  const mapName = (word) => (appearance.map in word.maps ? appearance.map : "attended");
  // Names the map of a word that lacks the chosen one.
  const shownAs = (word) => (mapName(word) !== appearance.map && withMap(appearance.map).length ? ` (${mapName(word)})` : "");
  const withMap = (name) => items().filter((word) => name in word.maps);
  const isSigned = (name) => appearance.special || name === "evidence" || name === "mattered";
  // The cells that are drawn for a word: its map, or the difference from the mean of the caption's maps.
  const cellsOf = (word) => {
    const name = mapName(word);
    if (!appearance.special) return word.maps[name];
    const all = withMap(name).map((each) => each.maps[name]);
    return word.maps[name].map((row, y) => row.map((cell, x) => cell - all.reduce((sum, map) => sum + map[y][x], 0) / all.length));
  };
  const rangeOf = (word) => {
    const name = mapName(word);
    const cells = (appearance.scale === "word" ? [word] : withMap(name)).flatMap((each) => cellsOf(each).flat());
    const [low, high] = [Math.min(...cells), Math.max(...cells)];
    const most = Math.max(-low, high);
    return isSigned(name) ? [-most, most] : [low, high];
  };

  // Hot cells glow and the rest of the photo is darkened, as in captioner/inference/render.py.
  const COLD = [96, 165, 250]; // cells that speak against the word
  const heat = (word) => {
    const [low, high] = rangeOf(word);
    const bright = appearance.colors === "light";
    const hasCold = low < 0 && !bright;
    let weights = cellsOf(word).map((row) => row.map((cell) => (hasCold ? cell / Math.max(high, 1e-9) : (cell - low) / Math.max(high - low, 1e-9))));
    if (appearance.shape === "smooth") weights = smooth(weights);
    const canvas = Object.assign(document.createElement("canvas"), { width: weights[0].length, height: weights.length });
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const amount = 0.7 * appearance.strength;
    weights.flat().forEach((value, at) => {
      const weight = clamp(value, hasCold ? -1 : 0, 1);
      const dark = 1 - amount * (1 - Math.abs(weight));
      const glow = bright ? 0 : amount * Math.abs(weight);
      const alpha = 1 - dark * (1 - glow);
      const color = 4 * Math.round(clamp(weight, 0, 1) * 255);
      for (let k = 0; k < 3; k++) {
        const part = weight < 0 ? COLD[k] : tables[appearance.colors][color + k];
        image.data[4 * at + k] = alpha ? (part * glow) / alpha : 0;
      }
      image.data[4 * at + 3] = 255 * alpha;
    });
    context.putImageData(image, 0, 0);
    return canvas;
  };
  const paint = (context, word) => {
    context.imageSmoothingEnabled = appearance.shape === "smooth";
    context.imageSmoothingQuality = "high";
    context.drawImage(heat(word), 0, 0, context.canvas.width, context.canvas.height);
  };

  // ---- State.
  const FUNCTION_WORDS = new Set("a an the of in on at with and is are to some by for".split(" "));
  let value = null;
  let beam = 0; // index into value.caption.beams
  let pinned = 0; // the chosen word; hovering only previews another one
  let previewed = 0;
  let selection = new Set(); // cells, row * columns + column
  let cursor = 0; // the keyboard's cell
  let timer = null;
  const stage = root.matches(".viewer") ? root : find(".viewer");
  const frame = find(".frame");
  const grid = find(".grid");
  const id = `cells-${Math.random().toString(36).slice(2)}`;

  const current = () => value.caption.beams[beam];
  const items = () => [...current().words, current().end];
  const isEnd = (word) => word === current().end;
  const attended = (word) => word.maps.attended.flat();
  const columns = () => items()[0].maps.attended[0].length;
  const rows = () => items()[0].maps.attended.length;
  // The index after the last word stands for the end: if it is given, the model only scored.
  const isGiven = (at) => value.caption.given.includes(at);
  const isScored = ({ caption }) => caption.given.includes(caption.beams[0].words.length);
  const SPECIAL = { __proto__: null, "<eos>": "end here", "<unk>": "(unknown word)" };
  const display = (text) => SPECIAL[text] ?? text;
  const label = (word) => (isEnd(word) ? "end" : display(word.text));
  const captionText = (caption) => caption.text.replaceAll("<unk>", SPECIAL["<unk>"]) || "(no words)";
  // Marks text as the caption's, which may be in a right-to-left language, or as the page's own.
  const mark = (node, own = true) => Object.assign(node, { dir: "auto", lang: own ? value.caption.language ?? "en" : "en" });
  const selected = () => (selection.size > 1 ? `these ${selection.size} cells` : "this cell");

  // ---- The chosen word.
  function draw() {
    const canvas = find(".map");
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [Math.round(frame.clientWidth * ratio), Math.round(frame.clientHeight * ratio)];
    if (!value || !width || !height) return;
    Object.assign(canvas, { width, height }); // which also clears it
    paint(canvas.getContext("2d"), items()[previewed]);
  }

  function drawLegend() {
    const word = items()[previewed];
    const name = mapName(word);
    const [low, high] = rangeOf(word);
    const write = isSigned(name) && !["attended", "shown"].includes(name)
      ? nats
      : (value) => (value < 0 ? "−" : "") + percent(Math.abs(value));
    const [first, ...others] = pointsOf(appearance.colors);
    const hasCold = low < 0 && appearance.colors !== "light";
    find(".legend").style.background = `linear-gradient(to right, ${hasCold ? [`rgb(${COLD})`, `${first} 50%`, ...others] : [first, ...others]})`;
    find(".low").textContent = write(low);
    find(".high").textContent = write(high);
    const [, meaning] = MAPS[name];
    const parts = [`${MAPS[name][0]}: ${meaning}`];
    // Models without detectors have no evidence at all, and no word lacks it.
    const lacks = name !== appearance.map && withMap(appearance.map).length > 0;
    if (lacks) parts.unshift(`This word has no map “${MAPS[appearance.map][0].toLowerCase()}”`);
    if (hasCold) parts.push(appearance.special ? "blue: less than in the mean map" : "blue cells speak against the word");
    if (appearance.special) parts.push("drawn is the difference from the caption’s mean map");
    if (name === "mattered" && !appearance.special && high < 0.05) parts.push("no single cell matters: others show the same");
    if (appearance.scale === "caption") parts.push("all words share the scale");
    find(".scale-text").textContent = `${parts.join("; ")}.`;
    for (const node of find(".maps").children) {
      node.hidden = !withMap(node.value).length;
      node.ariaPressed = String(node.value === (lacks ? appearance.map : name));
      node.classList.toggle("lacking", !(node.value in word.maps));
    }
  }

  // Shows a word at once: its map is painted in the next frame, without a request.
  function preview(at) {
    previewed = at;
    draw();
    drawBadge();
    find(".position").value = at;
    find(".position").ariaValueText = label(items()[at]);
    press(".words", at);
    press(".tiles", at);
    [...find(".words").children].forEach((node, k) => (node.tabIndex = k === at ? 0 : -1));
    drawLegend();
    drawPanel(items()[at], at);
    drawCells();
  }

  function drawBadge() {
    const word = items()[previewed];
    mark(find(".badge"), !selection.size && !isEnd(word)).textContent = selection.size
      ? `Each word’s attention to ${selected()}`
      : `${label(word)} ${percent(word.probability)}${shownAs(word)}`;
  }

  function drawPanel(word, at) {
    const cells = attended(word);
    mark(find(".word-title"), !isEnd(word)).textContent = isEnd(word) ? "The end of the caption" : `“${display(word.text)}”`;
    const [sign, title, usual] = VERDICTS[word.verdict] ?? ["", "", ""];
    const reason = word.verdict === "guessed" && word.fall < -1 ? "the photo speaks against it." : usual;
    const fall = word.verdict && ` With nothing to see in any cell its probability would be ${percent(clamp(word.probability * Math.exp(-word.fall), 0, 1))}, not ${percent(word.probability)}.`;
    find(".verdict").replaceChildren(...(word.verdict ? [make("b", "", `${sign} ${title}`), `: ${reason}${fall}`] : []));
    find(".detail").textContent =
      `Probability ${percent(word.probability)}${word.known ? "" : " (that of any word outside the vocabulary)"}. ` +
      `Attention is spread over about ${Math.round(word.cells)} of ${cells.length} cells, strongest at ${word.region} (${percent(Math.max(...cells))}).`;
    find(".alternatives").replaceChildren(...word.alternatives.map((other) => make("li", "", alternative(word, at, other))));
    find(".hint").textContent = find(".alternatives button")
      ? "Click a word to rewrite the caption from here:"
      : "The most likely words at this position:";
  }

  function alternative(word, at, { text, probability }) {
    const isChosen = text === word.text;
    // The first word cannot be the end, and nothing can follow a word outside the vocabulary.
    const before = current().words.slice(0, at);
    const isPossible = text === "<eos>" ? at > 0 : text !== "<unk>" && before.every((each) => each.known);
    const parts = [mark(make("span", "", display(text)), !(text in SPECIAL)), make("span", "number", percent(probability))];
    if (isChosen) parts.push(make("span", "tag", "chosen"));
    const node = rewrite && !isChosen && isPossible ? button("bar", () => replaceWord(at, text), ...parts) : make("span", "bar", ...parts);
    node.style.setProperty("--share", probability);
    return node;
  }

  function replaceWord(at, text) {
    const before = current().words.slice(0, at).map((word) => word.text);
    const given = value.caption.given.filter((each) => each < at);
    const whole = text === "<eos>";
    if (!whole) {
      before.push(text);
      given.push(at);
    }
    rewrite({ text: before.join(" "), given, whole });
  }

  // ---- Which words looked here?
  function buildCells() {
    grid.style.setProperty("--columns", columns());
    grid.style.setProperty("--rows", rows());
    const cell = (row, column) => Object.assign(make("div", "cell"), { role: "gridcell", id: `${id}-${row * columns() + column}` });
    grid.replaceChildren(...items()[0].maps.attended.map((cells, row) => Object.assign(make("div", "", ...cells.map((_, column) => cell(row, column))), { role: "row" })));
  }

  function drawCells() {
    const shares = attended(items()[previewed]);
    grid.querySelectorAll(".cell").forEach((cell, at) => {
      cell.ariaSelected = String(selection.has(at));
      cell.ariaLabel = `row ${Math.floor(at / columns()) + 1}, column ${(at % columns()) + 1}: ${percent(shares[at])}`;
      cell.classList.toggle("cursor", at === cursor);
    });
    grid.setAttribute("aria-activedescendant", `${id}-${cursor}`);
  }

  // While cells are selected each word shows how much of its attention lies in them.
  function drawShares() {
    const words = items();
    const shares = words.map((word) => [...selection].reduce((sum, cell) => sum + attended(word)[cell], 0));
    const largest = Math.max(...shares, 1e-9);
    [...find(".words").children].forEach((node, at) => {
      const { known, probability, verdict } = words[at];
      const prefix = !known ? "unknown · " : isGiven(at) ? "yours · " : "";
      node.classList.toggle("sharing", selection.size > 0);
      node.style.setProperty("--share", selection.size ? shares[at] / largest : probability);
      node.querySelector(".number").textContent = selection.size ? percent(shares[at]) : prefix + percent(probability);
      const [sign, title] = VERDICTS[verdict] ?? ["", ""];
      Object.assign(node.querySelector(".sign"), { textContent: sign, title, ariaLabel: title });
    });
    const ranked = words.map((word, at) => [shares[at], label(word)]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    find(".clear").hidden = !selection.size;
    find(".cells-note").textContent = selection.size
      ? `Words that attended most to ${selected()}: ${ranked.map(([share, text]) => `${text} ${percent(share)}`).join(", ")}.`
      : "";
    drawSeen();
    drawBadge();
    drawCells();
    selectionChanged();
  }

  // The words that the detectors see in the selected cells: in any of them, as if cells were independent.
  function drawSeen() {
    const { seen } = value.caption;
    const absent = new Map();
    for (const cell of seen ? selection : []) {
      for (const { text, probability } of seen[cell]) absent.set(text, (absent.get(text) ?? 1) * (1 - probability));
    }
    const used = new Set(current().words.map((word) => word.text));
    const ranked = [...absent].sort((a, b) => a[1] - b[1]).slice(0, 8);
    find(".seen-note").hidden = !ranked.length;
    find(".seen-words").replaceChildren(...ranked.map(([text, no]) => {
      const number = make("span", "number", `${percent(1 - no)}${used.has(text) ? " · in the caption" : ""}`);
      return make("li", "", mark(make("span", "", text)), " ", number);
    }));
  }

  const cellAt = (event) => {
    const box = grid.getBoundingClientRect();
    const index = (part, cells) => clamp(Math.floor(part * cells), 0, cells - 1);
    const row = index((event.clientY - box.top) / box.height, rows());
    return row * columns() + index((event.clientX - box.left) / box.width, columns());
  };
  let touch = null; // a finger that may yet scroll the page
  let dragging = false;
  let clearing = false; // a click on the only selected cell clears it, unless it becomes a drag
  const begin = (event) => {
    touch = null;
    cursor = cellAt(event);
    clearing = !event.shiftKey && selection.size === 1 && selection.has(cursor);
    if (!event.shiftKey) selection = new Set();
    selection.add(cursor);
    dragging = true;
    drawShares();
  };
  const endDrag = () => {
    touch = null;
    dragging = clearing = false;
  };
  grid.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    grid.setPointerCapture(event.pointerId);
    if (event.pointerType === "touch") touch = event;
    else begin(event);
  });
  grid.addEventListener("pointermove", (event) => {
    if (touch && Math.abs(event.clientX - touch.clientX) > 10) begin(touch);
    if (!dragging || selection.has(cellAt(event))) return;
    clearing = false;
    cursor = cellAt(event);
    selection.add(cursor);
    drawShares();
  });
  grid.addEventListener("pointerup", () => {
    if (touch) begin(touch);
    if (clearing) clearSelection();
    endDrag();
  });
  grid.addEventListener("pointercancel", endDrag);
  grid.addEventListener("keydown", (event) => {
    const width = columns();
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width }[event.key];
    if (step) {
      const next = cursor + step;
      const wraps = Math.abs(step) === 1 && Math.floor(next / width) !== Math.floor(cursor / width);
      if (!wraps && next in attended(items()[0])) cursor = next;
    } else if (event.key === " " || event.key === "Enter") {
      if (!selection.delete(cursor)) selection.add(cursor);
    } else if (event.key === "Escape") {
      selection.clear();
    } else {
      return;
    }
    event.preventDefault();
    drawShares();
  });
  function clearSelection() {
    selection = new Set();
    drawShares();
  }
  find(".clear").addEventListener("click", () => {
    clearSelection();
    grid.focus({ preventScroll: true });
  });

  // ---- Words.
  function pin(at) {
    pinned = at;
    preview(at);
    changed();
  }

  function wordButton(word, at) {
    const number = Object.assign(make("span", "number"), { dir: "ltr" });
    const sign = Object.assign(make("span", "sign"), { role: "img" });
    const node = button("word", () => pin(at), mark(make("span", "text", label(word)), !isEnd(word)), make("span", "numbers", sign, number));
    for (const [name, is] of Object.entries({ end: isEnd(word), given: isGiven(at), unknown: !word.known })) node.classList.toggle(name, is);
    node.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && preview(at));
    return node;
  }
  find(".words").addEventListener("pointerleave", (event) => event.pointerType === "mouse" && value && preview(pinned));
  find(".words").addEventListener("keydown", (event) => {
    const last = items().length - 1;
    const right = find(".words").dir === "rtl" ? -1 : 1;
    const to = { ArrowLeft: previewed - right, ArrowUp: previewed - 1, ArrowRight: previewed + right, ArrowDown: previewed + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    pin(clamp(to, 0, last));
    find(".words").children[pinned].focus();
  });

  // ---- Alternative captions, overview, playing.
  function buildBeams() {
    const { beams, sampled } = value.caption;
    const scored = isScored(value);
    find(".beams-title").textContent = scored ? "Your caption, as the model scores it" : sampled ? "Sampled captions" : "Alternative captions";
    find(".ranking").textContent = scored || beams.length < 2
      ? ""
      : `Ranked by score: the log-probability (log p), ${sampled ? "of captions drawn at random" : "adjusted for length"}.`;
    const chooseBeam = (at) => {
      choose(at);
      changed();
      find(".beams").children[at].focus();
    };
    find(".beams").replaceChildren(...beams.map((each, at) => {
      const numbers = `score ${signed(each.score)} · log p ${signed(each.log_probability)}`;
      const text = mark(make("span", "text", captionText(each)));
      return button("beam", () => chooseBeam(at), make("span", "rank", `#${at + 1}`), text, make("span", "number", numbers));
    }));
    press(".beams", beam);
  }

  function drawTiles() {
    if (!value || !find(".overview").open) return;
    const photo = find(".photo");
    const scale = 220 / Math.max(photo.naturalWidth, photo.naturalHeight);
    const [width, height] = [photo.naturalWidth, photo.naturalHeight].map((side) => Math.max(Math.round(side * scale), 1));
    find(".tiles").replaceChildren(...items().map((word, at) => {
      const canvas = Object.assign(make("canvas", ""), { width, height });
      const context = canvas.getContext("2d");
      context.drawImage(photo, 0, 0, width, height);
      paint(context, word);
      return button("tile", () => pin(at), canvas, mark(make("span", "", `${label(word)} ${percent(word.probability)}${shownAs(word)}`), !isEnd(word)));
    }));
    press(".tiles", previewed);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    find(".play").textContent = "Play";
  }
  function play() {
    if (timer) return stop();
    find(".play").textContent = "Pause";
    pin(previewed >= items().length - 1 ? 0 : previewed);
    timer = setInterval(() => {
      // The element was removed, or the caption is at its end.
      if (!root.isConnected || pinned >= items().length - 1) return stop();
      pin(pinned + 1);
    }, 900);
  }

  // How likely the best caption is right, in words; given words and samples have no confidence.
  function drawConfidence() {
    const { confidence } = value.caption;
    find(".confidence").hidden &&= confidence == null; // once shown, the line stays: nothing moves
    const share = clamp(Math.round(10 * confidence), 1, 9);
    const level = share > 7 ? "Sure" : share > 5 ? "Fairly sure" : share > 2 ? "Unsure" : "A guess";
    find(".confidence").textContent = confidence == null || beam > 0 ? "" : `${level}: about ${share} in 10 captions like this are right`;
  }

  // How clearly one cell speaks for a word.
  const clearest = (word) => Math.max(0, ...(word.maps.evidence ?? []).flat());

  // Shows one of the captions, starting with `word` or the content word that a cell speaks for most clearly.
  function choose(at, word) {
    stop();
    beam = at;
    selection = new Set();
    find(".words").replaceChildren(...items().map(wordButton));
    drawConfidence();
    buildBeams();
    buildCells();
    find(".position").max = items().length - 1;
    mark(find(".photo")).alt = captionText(current());
    // Each word has a direction of its own; their row takes the caption's.
    find(".words").dir = getComputedStyle(find(".beam .text")).direction;
    const content = current().words.filter((each) => !FUNCTION_WORDS.has(each.text)).sort((a, b) => clearest(b) - clearest(a) || a.cells - b.cells);
    pinned = word < items().length ? word : Math.max(current().words.indexOf(content[0]), 0);
    preview(pinned);
    drawShares();
    drawTiles();
    if (!current().end.verdict) explain?.(beam);
  }

  // Adds what explains the words; the chosen word, the selection and the focus stay.
  function explained(caption) {
    value.caption = caption;
    preview(previewed);
    drawShares();
    drawTiles();
  }

  const SELECTS = { shape: ".shape", colors: ".colors", scale: ".range" };

  function setAppearance({ strength = appearance.strength, ...change } = {}) {
    appearance.strength = strength;
    appearance.map = change.map in MAPS ? change.map : appearance.map;
    appearance.special = change.special ?? appearance.special;
    find(".strength").value = 100 * strength;
    find(".special").checked = appearance.special;
    for (const [name, selector] of Object.entries(SELECTS)) {
      const select = find(selector);
      select.value = change[name] ?? appearance[name];
      if (select.selectedIndex < 0) select.value = DEFAULTS[name]; // a link may hold anything
      appearance[name] = select.value;
    }
  }

  function show(next) {
    const hasFocus = root.contains(document.activeElement);
    value = next;
    setAppearance(next.appearance);
    const photo = find(".photo");
    if (photo.getAttribute("src") !== value.photo.url) photo.src = value.photo.url;
    // The stage has the photo's shape before the photo itself has arrived.
    stage.style.setProperty("--ratio", value.caption.size[0] / value.caption.size[1]);
    choose(next.beam < value.caption.beams.length ? next.beam : 0, next.word ?? (isScored(next) ? undefined : next.caption.given.at(-1)));
    // If the focused button is gone, the focus moves to the chosen word.
    if (hasFocus && !root.contains(document.activeElement)) find(".words").children[pinned]?.focus({ preventScroll: true });
  }

  find(".play").addEventListener("click", play);
  find(".position").addEventListener("input", (event) => {
    stop();
    pin(Number(event.target.value));
  });
  const set = (change) => {
    setAppearance(change);
    preview(previewed);
    drawTiles();
    changed();
  };
  find(".maps").append(...Object.entries(MAPS).map(([name, [title, meaning]]) =>
    Object.assign(button("", () => set({ map: name }), title), { value: name, title: `${meaning} (M: next map)` })));
  const onKey = (event) => {
    if (!root.isConnected) return document.removeEventListener("keydown", onKey);
    if (event.key.toLowerCase() !== "m" || event.ctrlKey || event.metaKey || event.altKey || !value) return;
    if (event.target.matches?.('input:not([type="checkbox"], [type="range"]), select, textarea')) return;
    const names = Object.keys(MAPS).filter((name) => withMap(name).length);
    set({ map: names[(names.indexOf(appearance.map) + 1) % names.length] });
  };
  document.addEventListener("keydown", onKey);
  find(".special").addEventListener("change", (event) => set({ special: event.target.checked }));
  find(".colors").append(...Object.keys(COLORS).map((name) => new Option(NAMES[name] ?? name, name)));
  find(".strength").addEventListener("input", (event) => set({ strength: event.target.value / 100 }));
  for (const [name, selector] of Object.entries(SELECTS)) find(selector).addEventListener("change", (event) => set({ [name]: event.target.value }));
  find(".overview").addEventListener("toggle", drawTiles);
  find(".photo").addEventListener("load", drawTiles);
  new ResizeObserver(draw).observe(frame);
  return {
    show,
    explained,
    state: () => ({ value, beam, word: pinned, appearance: { ...appearance }, defaults: DEFAULTS }),
    text: () => captionText(current()),
    percent,
    chosen: () => ({
      at: pinned, label: label(items()[pinned]), isEnd: isEnd(items()[pinned]),
      words: current().words.map((word) => word.text), map: cellsOf(items()[pinned]),
      mapTitle: MAPS[mapName(items()[pinned])][0] + (appearance.special ? ", only what is special" : ""), selection: [...selection],
    }),
  };
}
