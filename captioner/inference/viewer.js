// The attention viewer: draws one caption with its maps and lets the visitor explore it.
// Knows nothing of Gradio or of a server. Text from the value is set as text, never as HTML.
//
// mountViewer(root, { rewrite, changed }) returns { show(value), state(), set(change), play() }.
//   value: { photo: { url }, caption: Caption.to_dict(), beam, word, appearance }
//   rewrite({ text, given, whole }): asks for a caption that begins with `text`; without it the
//     alternatives cannot be clicked.
//   changed(): called when the visitor chose another caption, word or appearance.
function mountViewer(root, { rewrite, changed = () => {} } = {}) {
  const find = (selector) => root.querySelector(selector);
  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const button = (className, text) => {
    const node = make("button", className, text);
    node.type = "button";
    return node;
  };
  const percent = (share) =>
    share >= 0.0995 ? `${Math.round(share * 100)}%` : `${(share * 100).toFixed(1)}%`;

  // ---- Colors: 17 points of each of matplotlib's maps, interpolated linearly.
  const COLORS = {
    inferno: "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4",
    viridis: "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
    cividis: "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
    light: "",
  };
  const NAMES = { inferno: "inferno", viridis: "viridis", cividis: "cividis", light: "brightness only" };
  const table = (name) => {
    const points = COLORS[name]
      .split(" ")
      .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    return Array.from({ length: 256 }, (_, level) => {
      const place = (level / 255) * (points.length - 1);
      const low = Math.min(Math.floor(place), points.length - 2);
      return points[low].map((value, k) => value + (points[low + 1][k] - value) * (place - low));
    });
  };
  const tables = Object.fromEntries(
    Object.keys(COLORS).filter((name) => COLORS[name]).map((name) => [name, table(name)]),
  );

  // ---- A map: its cells, brought to 0..1, as an image that is laid over the photo.
  const FINE = 112;
  const cubic = (x) => {
    const d = Math.abs(x);
    if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
    return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
  };
  // Each cell is an area with its value at its middle; beyond the edge the edge goes on.
  const resampling = (cells) =>
    Array.from({ length: FINE }, (_, pixel) => {
      const place = ((pixel + 0.5) * cells) / FINE - 0.5;
      const row = new Array(cells).fill(0);
      for (let at = Math.floor(place) - 1; at <= Math.floor(place) + 2; at++) {
        row[Math.min(Math.max(at, 0), cells - 1)] += cubic(place - at);
      }
      return row;
    });
  const multiply = (a, b) =>
    a.map((row) => b[0].map((_, column) => row.reduce((sum, value, k) => sum + value * b[k][column], 0)));
  const transpose = (a) => a[0].map((_, column) => a.map((row) => row[column]));
  const smooth = (cells) =>
    multiply(multiply(resampling(cells.length), cells), transpose(resampling(cells[0].length)));

  const DEFAULTS = { strength: 0.75, shape: "smooth", colors: "inferno", scale: "word" };
  const appearance = { ...DEFAULTS };

  const rangeOf = (word) => {
    const cells = appearance.scale === "word" ? word.attention.flat() : items().flatMap((each) => each.attention.flat());
    return [Math.min(...cells), Math.max(...cells)];
  };

  // Attended cells glow and the rest of the photo is darkened, as in captioner/overlay.py.
  const heat = (word) => {
    const [low, high] = rangeOf(word);
    let weights = word.attention.map((row) => row.map((cell) => (cell - low) / Math.max(high - low, 1e-9)));
    if (appearance.shape === "smooth") weights = smooth(weights);
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [weights[0].length, weights.length];
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const amount = 0.7 * appearance.strength;
    weights.flat().forEach((value, at) => {
      const weight = Math.min(Math.max(value, 0), 1);
      const dark = 1 - amount * (1 - weight);
      const glow = appearance.colors === "light" ? 0 : amount * weight;
      const alpha = 1 - dark * (1 - glow);
      const color = glow ? tables[appearance.colors][Math.round(weight * 255)] : [0, 0, 0];
      for (let k = 0; k < 3; k++) image.data[4 * at + k] = alpha ? (color[k] * glow) / alpha : 0;
      image.data[4 * at + 3] = 255 * alpha;
    });
    context.putImageData(image, 0, 0);
    return canvas;
  };
  const paint = (context, word, width, height) => {
    context.imageSmoothingEnabled = appearance.shape === "smooth";
    context.imageSmoothingQuality = "high";
    context.drawImage(heat(word), 0, 0, width, height);
  };

  // ---- State.
  const FUNCTION_WORDS = new Set("a an the of in on at with and is are to some by for".split(" "));
  let value = null;
  let beam = 0; // index into value.caption.beams
  let pinned = 0; // the chosen word; hovering only previews another one
  let previewed = 0;
  let selection = new Set(); // cells, row * columns + column
  let cursor = 0; // the cell that the keyboard is on
  let timer = null;
  const stage = root.matches(".viewer") ? root : find(".viewer");
  const frame = find(".frame");
  const grid = find(".grid");
  const id = `cells-${Math.random().toString(36).slice(2)}`;

  const current = () => value.caption.beams[beam];
  const items = () => [...current().words, current().end];
  // The index after the last word stands for the end: if it is given, the model only scored.
  const isGiven = (at) => value.caption.given.includes(at);
  const scored = () => isGiven(current().words.length);
  const SPECIAL = { __proto__: null, "<eos>": "end here", "<unk>": "(unknown word)" };
  const display = (text) => SPECIAL[text] ?? text;
  const textOf = (caption) => caption.text.replaceAll("<unk>", SPECIAL["<unk>"]) || "(no words)";
  // Marks text as the caption's, whose language may be read from the right, or as the page's own.
  const mark = (node, own = true) => {
    node.dir = "auto";
    node.lang = own ? value.caption.language ?? "en" : "en";
    return node;
  };
  const label = (word) => (word === current().end ? "end" : display(word.text));

  function draw() {
    const canvas = find(".map");
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [Math.round(frame.clientWidth * ratio), Math.round(frame.clientHeight * ratio)];
    if (!value || !width || !height) return;
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    paint(context, items()[previewed], width, height);
  }

  function drawLegend() {
    const [low, high] = rangeOf(items()[previewed]);
    const context = find(".legend").getContext("2d");
    const { width } = context.canvas;
    for (let x = 0; x < width; x++) {
      const level = Math.round((x / (width - 1)) * 255);
      context.fillStyle = `rgb(${appearance.colors === "light" ? [level, level, level] : tables[appearance.colors][level]})`;
      context.fillRect(x, 0, 1, 1);
    }
    find(".low").textContent = percent(low);
    find(".high").textContent = percent(high);
    find(".scale-text").textContent =
      `share of attention per cell (scaled ${appearance.scale === "word" ? "per word" : "for all words alike"})`;
  }

  // Shows a word at once: its map is painted in the next frame, without a request.
  function preview(at) {
    previewed = at;
    draw();
    const word = items()[at];
    drawBadge();
    find(".position").value = at;
    find(".position").setAttribute("aria-valuetext", label(word));
    [...find(".words").children].forEach((node, k) => {
      node.setAttribute("aria-pressed", String(k === at));
      node.tabIndex = k === at ? 0 : -1;
    });
    [...find(".tiles").children].forEach((node, k) => node.setAttribute("aria-pressed", String(k === at)));
    drawLegend();
    drawPanel(word, at);
    drawCells();
  }

  function drawBadge() {
    const word = items()[previewed];
    const cells = selection.size > 1 ? `these ${selection.size} cells` : "this cell";
    mark(find(".badge"), !selection.size && word !== current().end).textContent = selection.size
      ? `Each word’s attention to ${cells}`
      : `${label(word)} ${percent(word.probability)}`;
  }

  function drawPanel(word, at) {
    const cells = word.attention.length * word.attention[0].length;
    const strongest = Math.max(...word.attention.flat());
    mark(find(".word-title"), word !== current().end).textContent = word === current().end ? "The end of the caption" : `“${display(word.text)}”`;
    find(".detail").textContent =
      `Probability ${percent(word.probability)}${word.known ? "" : ", that of any word outside the vocabulary"}. ` +
      `Attention is spread over about ${Math.round(word.cells)} of ${cells} cells, strongest at ${word.region} (${percent(strongest)}).`;
    const before = current().words.slice(0, at);
    const nodes = word.alternatives.map((other) => {
      const written = other.text === word.text;
      // The first word cannot be the end, and nothing can follow a word outside the vocabulary.
      const possible = other.text === "<eos>" ? at > 0 : other.text !== "<unk>" && before.every((each) => each.known);
      const clickable = rewrite && !written && possible;
      const node = clickable ? button("bar") : make("span", "bar");
      node.style.setProperty("--share", other.probability);
      const text = mark(make("span", "", display(other.text)), !(other.text in SPECIAL));
      node.append(text, make("span", "number", percent(other.probability)));
      if (written) node.append(make("span", "tag", "chosen"));
      if (clickable) node.addEventListener("click", () => replaceWord(at, other.text));
      const entry = make("li");
      entry.append(node);
      return entry;
    });
    find(".hint").textContent = nodes.some((node) => node.querySelector("button"))
      ? "Click a word to rewrite the caption from here:"
      : "The most likely words at this place:";
    find(".alternatives").replaceChildren(...nodes);
  }

  function replaceWord(at, text) {
    const before = current().words.slice(0, at).map((word) => word.text);
    const whole = text === "<eos>";
    const given = value.caption.given.filter((each) => each < at);
    if (!whole) {
      before.push(text);
      given.push(at);
    }
    rewrite({ text: before.join(" "), given, whole });
  }

  // ---- Which words looked here?
  const cellName = (at) => {
    const { length: columns } = items()[previewed].attention[0];
    return `row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}`;
  };

  function buildCells() {
    const { attention } = items()[0];
    const columns = attention[0].length;
    grid.style.setProperty("--columns", columns);
    grid.style.setProperty("--rows", attention.length);
    grid.replaceChildren(
      ...attention.map((row, r) => {
        const line = make("div");
        line.setAttribute("role", "row");
        line.append(
          ...row.map((_, c) => {
            const cell = make("div", "cell");
            cell.setAttribute("role", "gridcell");
            cell.id = `${id}-${r * columns + c}`;
            return cell;
          }),
        );
        return line;
      }),
    );
  }

  function drawCells() {
    const { attention } = items()[previewed];
    grid.querySelectorAll(".cell").forEach((cell, at) => {
      cell.setAttribute("aria-selected", String(selection.has(at)));
      cell.setAttribute("aria-label", `${cellName(at)}: ${percent(attention.flat()[at])}`);
      cell.classList.toggle("cursor", at === cursor);
    });
    grid.setAttribute("aria-activedescendant", `${id}-${cursor}`);
  }

  // While cells are selected each word shows how much of its attention lies in them.
  function drawShares() {
    const words = items();
    const shares = words.map(({ attention }) => {
      const flat = attention.flat();
      return [...selection].reduce((sum, cell) => sum + flat[cell], 0);
    });
    const most = Math.max(...shares, 1e-9);
    [...find(".words").children].forEach((node, at) => {
      const word = words[at];
      const note = isGiven(at) ? `yours · ${percent(word.probability)}` : percent(word.probability);
      node.classList.toggle("sharing", selection.size > 0);
      node.style.setProperty("--share", selection.size ? shares[at] / most : word.probability);
      node.querySelector(".number").textContent = selection.size
        ? percent(shares[at])
        : word.known ? note : `not known · ${percent(word.probability)}`;
    });
    const ranked = words.map((word, at) => [shares[at], label(word)]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    const place = selection.size > 1 ? `these ${selection.size} cells` : "this cell";
    find(".clear").hidden = !selection.size;
    find(".cells-note").textContent = selection.size
      ? `Most attention to ${place}: ${ranked.map(([share, text]) => `${text} ${percent(share)}`).join(", ")}.`
      : "";
    drawBadge();
    drawCells();
  }

  const cellAt = (event) => {
    const { attention } = items()[0];
    const box = grid.getBoundingClientRect();
    const part = (place, cells) => Math.min(Math.max(Math.floor(place * cells), 0), cells - 1);
    return (
      part((event.clientY - box.top) / box.height, attention.length) * attention[0].length +
      part((event.clientX - box.left) / box.width, attention[0].length)
    );
  };
  let touch = null; // a finger that may yet turn out to scroll the page
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
    dragging = clearing = false;
  });
  grid.addEventListener("pointercancel", () => {
    touch = null;
    dragging = clearing = false;
  });
  grid.addEventListener("keydown", (event) => {
    const columns = items()[0].attention[0].length;
    const cells = columns * items()[0].attention.length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step) {
      const sideways = Math.abs(step) === 1 && Math.floor((cursor + step) / columns) !== Math.floor(cursor / columns);
      if (!sideways && cursor + step >= 0 && cursor + step < cells) cursor += step;
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

  function buildWords() {
    find(".words").replaceChildren(
      ...items().map((word, at) => {
        const node = button("word");
        node.classList.toggle("end", word === current().end);
        node.classList.toggle("given", isGiven(at));
        node.classList.toggle("unknown", !word.known);
        const number = make("span", "number");
        number.dir = "ltr";
        node.append(mark(make("span", "text", label(word)), word !== current().end), number);
        node.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && preview(at));
        node.addEventListener("click", () => pin(at));
        return node;
      }),
    );
  }
  find(".words").addEventListener("pointerleave", (event) => event.pointerType === "mouse" && value && preview(pinned));
  find(".words").addEventListener("keydown", (event) => {
    const last = items().length - 1;
    const right = find(".words").dir === "rtl" ? -1 : 1;
    const to = { ArrowLeft: previewed - right, ArrowUp: previewed - 1, ArrowRight: previewed + right, ArrowDown: previewed + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    pin(Math.min(Math.max(to, 0), last));
    find(".words").children[pinned].focus();
  });

  // ---- Alternative captions, overview, playing.
  const signed = (number) => number.toFixed(2).replace("-", "−");

  function buildBeams() {
    const { beams, sampled } = value.caption;
    find(".beams-title").textContent = scored() ? "Your caption, as the model scores it" : sampled ? "Sampled captions" : "Alternative captions";
    find(".ranking").textContent = scored() || beams.length < 2
      ? ""
      : `Ranked by score: the log-probability (log p), ${sampled ? "of captions drawn at random" : "adjusted for length"}.`;
    find(".beams").replaceChildren(
      ...beams.map((each, at) => {
        const node = button("beam");
        const text = mark(make("span", "text", textOf(each)));
        node.setAttribute("aria-pressed", String(at === beam));
        node.append(make("span", "rank", `#${at + 1}`), text, make("span", "number", `score ${signed(each.score)} · log p ${signed(each.log_probability)}`));
        node.addEventListener("click", () => {
          choose(at);
          changed();
          find(".beams").children[at].focus();
        });
        return node;
      }),
    );
  }

  function drawTiles() {
    if (!value || !find(".overview").open) return;
    const photo = find(".photo");
    find(".tiles").replaceChildren(
      ...items().map((word, at) => {
        const node = button("tile");
        const canvas = make("canvas");
        const scale = Math.min(220 / photo.naturalWidth, 220 / photo.naturalHeight);
        canvas.width = Math.max(Math.round(photo.naturalWidth * scale), 1);
        canvas.height = Math.max(Math.round(photo.naturalHeight * scale), 1);
        const context = canvas.getContext("2d");
        context.drawImage(photo, 0, 0, canvas.width, canvas.height);
        paint(context, word, canvas.width, canvas.height);
        node.setAttribute("aria-pressed", String(at === previewed));
        node.append(canvas, mark(make("span", "", `${label(word)} ${percent(word.probability)}`), word !== current().end));
        node.addEventListener("click", () => pin(at));
        return node;
      }),
    );
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
      // The element is gone, or the caption is at its end.
      if (!root.isConnected || pinned >= items().length - 1) return stop();
      pin(pinned + 1);
    }, 900);
  }

  // Shows another caption of the value, starting on the content word with the most focused map.
  function choose(at, word) {
    stop();
    beam = at;
    selection = new Set();
    buildWords();
    buildBeams();
    buildCells();
    find(".position").max = items().length - 1;
    mark(find(".photo")).alt = textOf(current());
    // The words have directions of their own; their row takes the caption's.
    find(".words").dir = getComputedStyle(find(".beam .text")).direction;
    const content = current().words.filter((each) => !FUNCTION_WORDS.has(each.text)).sort((a, b) => a.cells - b.cells);
    pinned = word < items().length ? word : Math.max(current().words.indexOf(content[0]), 0);
    preview(pinned);
    drawShares();
    drawTiles();
  }

  function setAppearance(change = {}) {
    for (const [name, setting] of Object.entries(change)) if (name in appearance) appearance[name] = setting;
    if (!Object.hasOwn(COLORS, appearance.colors)) appearance.colors = DEFAULTS.colors;
    for (const [name, selector] of [["shape", ".shape"], ["colors", ".colors"], ["scale", ".range"]]) find(selector).value = appearance[name];
    find(".strength").value = 100 * appearance.strength;
  }

  function show(next) {
    const busy = root.contains(document.activeElement);
    value = next;
    setAppearance(next.appearance);
    const photo = find(".photo");
    if (photo.getAttribute("src") !== value.photo.url) photo.src = value.photo.url;
    // The stage has the photo's shape before the photo itself has arrived.
    stage.style.setProperty("--ratio", value.caption.size[0] / value.caption.size[1]);
    const beams = value.caption.beams.length;
    choose(next.beam < beams ? next.beam : 0, next.word ?? (scoredBy(next) ? undefined : next.caption.given.at(-1)));
    // The pressed button may be gone: keyboard focus moves to the chosen word.
    if (busy && !root.contains(document.activeElement)) find(".words").children[pinned]?.focus({ preventScroll: true });
  }
  const scoredBy = ({ caption }) => caption.given.includes(caption.beams[0].words.length);

  find(".play").addEventListener("click", play);
  find(".position").addEventListener("input", (event) => {
    stop();
    pin(Number(event.target.value));
  });
  const tune = (name, read) => (event) => {
    appearance[name] = read(event.target.value);
    preview(previewed);
    drawTiles();
    changed();
  };
  find(".strength").addEventListener("input", tune("strength", (number) => number / 100));
  find(".shape").addEventListener("change", tune("shape", String));
  find(".colors").append(...Object.keys(COLORS).map((name) => new Option(NAMES[name], name)));
  find(".colors").addEventListener("change", tune("colors", String));
  find(".range").addEventListener("change", tune("scale", String));
  find(".overview").addEventListener("toggle", drawTiles);
  find(".photo").addEventListener("load", drawTiles);
  new ResizeObserver(draw).observe(frame);
  return {
    show,
    state: () => ({ value, beam, word: pinned, appearance: { ...appearance }, defaults: DEFAULTS }),
    text: () => textOf(current()),
  };
}
