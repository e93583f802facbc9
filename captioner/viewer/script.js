// The attention viewer: draws one caption with its maps and lets the visitor look around in it.
// Knows nothing of Gradio. Everything that comes from the value is set as text, never as HTML.
function mountViewer(root, { steer, take, restore } = {}) {
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
    share >= 0.0995 ? `${Math.round(share * 100)} %` : `${(share * 100).toFixed(1)} %`;

  // ---- Colours: 17 points of matplotlib's maps, straight lines between them.
  const COLORS = {
    inferno: "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4",
    viridis: "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
    cividis: "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
    light: "",
  };
  const NAMES = { inferno: "inferno", viridis: "viridis", cividis: "cividis", light: "light only" };
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

  const look = { strength: 0.75, shape: "smooth", colors: "inferno", range: "word" };

  const rangeOf = (word) => {
    const cells = look.range === "word" ? word.attention.flat() : items().flatMap((each) => each.attention.flat());
    return [Math.min(...cells), Math.max(...cells)];
  };

  // What is looked at glows, the rest of the photo turns darker: as captioner/overlay.py blends.
  const heat = (word) => {
    const [low, high] = rangeOf(word);
    let weights = word.attention.map((row) => row.map((cell) => (cell - low) / Math.max(high - low, 1e-9)));
    if (look.shape === "smooth") weights = smooth(weights);
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [weights[0].length, weights.length];
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const amount = 0.7 * look.strength;
    weights.flat().forEach((value, at) => {
      const weight = Math.min(Math.max(value, 0), 1);
      const dark = 1 - amount * (1 - weight);
      const glow = look.colors === "light" ? 0 : amount * weight;
      const alpha = 1 - dark * (1 - glow);
      const color = glow ? tables[look.colors][Math.round(weight * 255)] : [0, 0, 0];
      for (let k = 0; k < 3; k++) image.data[4 * at + k] = alpha ? (color[k] * glow) / alpha : 0;
      image.data[4 * at + 3] = 255 * alpha;
    });
    context.putImageData(image, 0, 0);
    return canvas;
  };
  const paint = (context, word, width, height) => {
    context.imageSmoothingEnabled = look.shape === "smooth";
    context.imageSmoothingQuality = "high";
    context.drawImage(heat(word), 0, 0, width, height);
  };

  // ---- What is shown.
  const SMALL = new Set("a an the of in on at with and is are to some by for".split(" "));
  let value = null; // { photo: { url }, caption: Caption.to_dict() }
  let beam = 0; // of value.caption.beams
  let pinned = 0; // the word that was clicked; hovering only previews
  let shown = 0;
  let asked = new Set(); // cells, row * columns + column
  let cursor = 0;
  let history = []; // [value, beam, word] before each steering
  let timer = null;
  const frame = find(".frame");
  const grid = find(".grid");
  const id = `cells-${Math.random().toString(36).slice(2)}`;

  const chosen = () => value.caption.beams[beam];
  const items = () => [...chosen().words, chosen().end];
  // The place after the last word is the end: where that is given, the model only read.
  const isGiven = (at) => value.caption.given.includes(at);
  const ended = () => isGiven(chosen().words.length);
  const label = (word) => (word === chosen().end ? "end" : word.text);
  const plain = (text) => ({ "<eos>": "end here", "<unk>": "a word it does not know" })[text] ?? text;

  function draw() {
    const canvas = find(".map");
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [Math.round(frame.clientWidth * ratio), Math.round(frame.clientHeight * ratio)];
    if (!value || !width || !height) return;
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    paint(context, items()[shown], width, height);
  }

  function drawLegend() {
    const [low, high] = rangeOf(items()[shown]);
    const context = find(".legend").getContext("2d");
    const { width } = context.canvas;
    for (let x = 0; x < width; x++) {
      const level = Math.round((x / (width - 1)) * 255);
      context.fillStyle = `rgb(${look.colors === "light" ? [level, level, level] : tables[look.colors][level]})`;
      context.fillRect(x, 0, 1, 1);
    }
    find(".low").textContent = percent(low);
    find(".high").textContent = percent(high);
    find(".scale-text").textContent =
      look.range === "word" ? "of the attention in a cell; each word has its own scale" : "of the attention in a cell; one scale for all words";
  }

  // Everything that follows from the shown word, at once: the map is painted in the next frame.
  function preview(at) {
    shown = at;
    draw();
    const word = items()[at];
    find(".badge").textContent = `${label(word)} ${percent(word.probability)}`;
    find(".position").value = at;
    find(".position").setAttribute("aria-valuetext", label(word));
    [...find(".words").children].forEach((node, k) => {
      node.setAttribute("aria-pressed", String(k === at));
      node.tabIndex = k === at ? 0 : -1;
    });
    [...find(".tiles").children].forEach((node, k) => node.setAttribute("aria-pressed", String(k === at)));
    drawLegend();
    drawWord(word, at);
    drawCells();
  }

  function drawWord(word, at) {
    const cells = word.attention.length * word.attention[0].length;
    const strongest = Math.max(...word.attention.flat());
    find(".word-title").textContent = word === chosen().end ? "The end of the caption" : `“${word.text}”`;
    find(".detail").textContent =
      `${percent(word.probability)} sure${word.known ? "" : " of a word it does not know"}. ` +
      `Looks at about ${Math.round(word.cells)} of ${cells} cells, most at the ${word.place} (${percent(strongest)} there).`;
    const before = chosen().words.slice(0, at);
    find(".alternatives").replaceChildren(
      ...word.alternatives.map((other) => {
        const same = other.text === word.text;
        // The first word cannot be the end, and from a word that the model lacks nothing goes on.
        const possible = other.text === "<eos>" ? at > 0 : other.text !== "<unk>" && before.every((each) => each.known);
        const open = steer && !same && possible;
        const node = open ? button("bar") : make("span", "bar");
        node.style.setProperty("--share", other.probability);
        node.append(make("span", "", plain(other.text)), make("span", "number", percent(other.probability)));
        if (same) node.append(make("span", "tag", "written"));
        if (open) {
          node.title = other.text === "<eos>" ? "End the caption here" : "Write on from this word";
          node.addEventListener("click", () => exchange(at, other.text));
        }
        const entry = make("li");
        entry.append(node);
        return entry;
      }),
    );
  }

  function exchange(at, text) {
    const before = chosen().words.slice(0, at).map((word) => word.text);
    const whole = text === "<eos>";
    const given = value.caption.given.filter((each) => each < at);
    if (!whole) {
      before.push(text);
      given.push(at);
    }
    steer({ text: before.join(" "), given, whole });
  }

  // ---- Asking the photo.
  const cellName = (at) => {
    const { length: columns } = items()[shown].attention[0];
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
    const { attention } = items()[shown];
    grid.querySelectorAll(".cell").forEach((cell, at) => {
      cell.setAttribute("aria-selected", String(asked.has(at)));
      cell.setAttribute("aria-label", `${cellName(at)}: ${percent(attention.flat()[at])}`);
      cell.classList.toggle("cursor", at === cursor);
    });
    grid.setAttribute("aria-activedescendant", `${id}-${cursor}`);
  }

  function drawAnswers() {
    const count = asked.size;
    find(".question").textContent = count
      ? `The words that looked at the chosen ${count > 1 ? `${count} cells` : "cell"}, most first:`
      : "Click a cell of the photo, or drag over several: which words looked there?";
    const words = chosen().words.map((word, at) => {
      const flat = word.attention.flat();
      return { word, at, share: [...asked].reduce((sum, cell) => sum + flat[cell], 0) };
    });
    words.sort((a, b) => b.share - a.share);
    find(".answers").replaceChildren(
      ...(count ? words : []).map(({ word, at, share }) => {
        const node = button("bar");
        node.style.setProperty("--share", share);
        node.append(make("span", "", word.text), make("span", "number", percent(share)));
        node.addEventListener("click", () => pin(at));
        const entry = make("li");
        entry.append(node);
        return entry;
      }),
    );
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
  let touched = null; // a finger that may yet turn out to scroll the page
  let dragging = false;
  const begin = (event) => {
    touched = null;
    cursor = cellAt(event);
    // A second click on the only chosen cell takes the question back.
    const again = asked.size === 1 && asked.has(cursor);
    if (!event.shiftKey) asked = new Set();
    if (!again) asked.add(cursor);
    dragging = !again;
    drawAnswers();
  };
  grid.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    grid.setPointerCapture(event.pointerId);
    if (event.pointerType === "touch") touched = event;
    else begin(event);
  });
  grid.addEventListener("pointermove", (event) => {
    if (touched && Math.abs(event.clientX - touched.clientX) > 10) begin(touched);
    if (!dragging || asked.has(cellAt(event))) return;
    cursor = cellAt(event);
    asked.add(cursor);
    drawAnswers();
  });
  grid.addEventListener("pointerup", () => {
    if (touched) begin(touched);
    dragging = false;
  });
  grid.addEventListener("pointercancel", () => {
    touched = null;
    dragging = false;
  });
  grid.addEventListener("keydown", (event) => {
    const columns = items()[0].attention[0].length;
    const cells = columns * items()[0].attention.length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step) {
      const sideways = Math.abs(step) === 1 && Math.floor((cursor + step) / columns) !== Math.floor(cursor / columns);
      if (!sideways && cursor + step >= 0 && cursor + step < cells) cursor += step;
    } else if (event.key === " " || event.key === "Enter") {
      if (!asked.delete(cursor)) asked.add(cursor);
    } else if (event.key === "Escape") {
      asked.clear();
    } else {
      return;
    }
    event.preventDefault();
    drawAnswers();
  });

  // ---- Words.
  function pin(at) {
    pinned = at;
    preview(at);
  }

  function buildWords() {
    const row = find(".words");
    row.replaceChildren(
      ...items().map((word, at) => {
        const node = button("word");
        node.classList.toggle("end", word === chosen().end);
        node.classList.toggle("given", isGiven(at));
        node.style.setProperty("--share", word.probability);
        const note = isGiven(at) ? `yours · ${percent(word.probability)}` : percent(word.probability);
        node.append(make("span", "text", label(word)), make("span", "number", word.known ? note : "unknown"));
        node.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && preview(at));
        node.addEventListener("click", () => pin(at));
        return node;
      }),
    );
  }
  find(".words").addEventListener("pointerleave", (event) => event.pointerType === "mouse" && value && preview(pinned));
  find(".words").addEventListener("keydown", (event) => {
    const last = items().length - 1;
    const to = { ArrowLeft: shown - 1, ArrowUp: shown - 1, ArrowRight: shown + 1, ArrowDown: shown + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    pin(Math.min(Math.max(to, 0), last));
    find(".words").children[pinned].focus();
  });

  // ---- Beams, overview, playing.
  function buildBeams() {
    const { beams } = value.caption;
    find(".beams-title").textContent = ended() ? "Your caption, as the model reads it" : "Captions to choose from";
    find(".beams").replaceChildren(
      ...beams.map((each, at) => {
        const node = button("beam");
        const text = each.text || "(no words)";
        node.setAttribute("aria-pressed", String(at === beam));
        node.append(make("span", "rank", `#${at + 1}`), make("span", "text", text), make("span", "number", `log p ${each.log_probability.toFixed(2).replace("-", "−")}`));
        node.addEventListener("click", () => {
          choose(at);
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
        node.setAttribute("aria-pressed", String(at === shown));
        node.append(canvas, make("span", "", `${label(word)} ${percent(word.probability)}`));
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
    pin(shown >= items().length - 1 ? 0 : shown);
    timer = setInterval(() => {
      // The element is gone, or the caption is at its end.
      if (!root.isConnected || pinned >= items().length - 1) return stop();
      pin(pinned + 1);
    }, 900);
  }

  // Write a caption's words, beams and tiles anew, and start on a word that says something.
  function choose(at, word) {
    stop();
    beam = at;
    asked = new Set();
    buildWords();
    buildBeams();
    buildCells();
    find(".position").max = items().length - 1;
    find(".photo").alt = chosen().text;
    const first = chosen().words.findIndex((each) => !SMALL.has(each.text));
    pin(Math.min(word ?? Math.max(first, 0), items().length - 1));
    drawAnswers();
    drawTiles();
  }

  function drawSteered() {
    const { given } = value.caption;
    const words = chosen().words.filter((_, at) => isGiven(at)).map((word) => word.text);
    find(".steered").hidden = !given.length;
    find(".undo").hidden = !history.length;
    find(".steered-text").textContent = [
      words.length && `You fixed: ${words.join(", ")}.`,
      ended() ? "You ended the caption." : "The rest is written from there.",
    ].filter(Boolean).join(" ");
  }

  function draft(next, at = 0, word) {
    const busy = root.contains(document.activeElement);
    value = next;
    beam = at;
    find(".empty").hidden = Boolean(value);
    find(".filled").hidden = !value;
    find(".taken").textContent = "";
    if (!value) return stop();
    const photo = find(".photo");
    const arrived = photo.getAttribute("src") !== value.photo.url;
    if (arrived) photo.src = value.photo.url;
    // The frame has the photo's shape before the photo itself is there.
    frame.style.setProperty("--ratio", value.caption.size[0] / value.caption.size[1]);
    choose(at, word ?? (ended() ? undefined : value.caption.given.at(-1)));
    drawSteered();
    // On a phone the viewer lies below the photo that was brought.
    if (arrived && frame.getBoundingClientRect().top > window.innerHeight * 0.6) root.scrollIntoView();
    // The button that was pressed may be gone: the keyboard goes on at the word.
    if (busy && !root.contains(document.activeElement)) find(".words").children[pinned]?.focus();
  }

  // A steered caption of the same photo can be taken back; anything else starts anew.
  function show(next) {
    const steered = value && next && next.caption.given.length && next.photo.url === value.photo.url;
    history = steered ? [...history, [value, beam, pinned]] : [];
    draft(next || null, next?.beam);
  }

  find(".undo").addEventListener("click", () => {
    const [earlier, at, word] = history.pop();
    restore?.(earlier);
    draft(earlier, at, word);
  });
  find(".play").addEventListener("click", play);
  find(".position").addEventListener("input", (event) => {
    stop();
    pin(Number(event.target.value));
  });
  const tune = (name, read) => (event) => {
    look[name] = read(event.target.value);
    preview(shown);
    drawTiles();
  };
  find(".strength").addEventListener("input", tune("strength", (number) => number / 100));
  find(".shape").addEventListener("change", tune("shape", String));
  find(".colors").append(...Object.keys(COLORS).map((name) => new Option(NAMES[name], name)));
  find(".colors").addEventListener("change", tune("colors", String));
  find(".range").addEventListener("change", tune("range", String));
  find(".overview").addEventListener("toggle", drawTiles);
  find(".photo").addEventListener("load", drawTiles);
  find(".copy").addEventListener("click", async () => {
    const { text } = chosen();
    try {
      await navigator.clipboard.writeText(text);
      find(".taken").textContent = "Copied.";
    } catch {
      find(".taken").textContent = "The browser did not let the page copy.";
    }
  });
  root.querySelectorAll("[data-format]").forEach((node) => {
    node.hidden = !take;
    node.addEventListener("click", () => {
      find(".taken").textContent = "Being made …";
      take({ format: node.dataset.format, beam });
    });
  });
  new ResizeObserver(draw).observe(frame);
  return { show };
}
