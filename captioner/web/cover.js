// Tests the map on the screen: covers cells of the photo, and shows what becomes of the chosen word.
// The server captions the covered photo and measures; the cover over the photo is drawn here.
//
// mountCover(root, viewer, request) returns { update(), answer(value), uncover() }.
//   viewer: of mountViewer.
//   request({ request, text, word, cells }): asks for the test of a cover.
//   update(): the visitor may have chosen another word, or other cells.
function mountCover(root, viewer, request) {
  const find = (selector) => root.querySelector(selector);
  const make = (name, className, text = "") => Object.assign(document.createElement(name), { className, textContent: text });
  const { percent } = viewer;
  const [frame, photo, count] = [".frame", ".photo", ".count"].map(find);
  const layer = make("canvas", "cover");
  layer.ariaHidden = "true";
  const badge = make("span", "covered-badge");
  badge.ariaHidden = "true";
  find(".grid").before(layer);
  frame.append(badge);
  find(".panel").append(find(".test"));

  let word = null; // whose map is tested: a key of photo, caption, place and map
  let number = 0; // of the latest request; answers to earlier ones are dropped
  let waiting = false;
  let result = null; // the answer that is shown
  let planning = false; // whether the hottest cells are outlined

  const cellsText = (cells) => (cells.length > 1 ? `these ${cells.length} cells` : "this cell");

  // ---- Drawing.
  function hottest() {
    const shares = viewer.chosen().map.flat();
    const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a] || a - b);
    return order.slice(0, count.valueAsNumber);
  }

  // The photo, blurred as the model sees it: in a square, by a share of its side. Not by the
  // canvas's own filter, which not every browser has.
  function blur(share) {
    const side = 56;
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(photo, 0, 0, side, side);
    const image = context.getImageData(0, 0, side, side);
    const reach = Math.ceil(3 * share * side);
    const weights = Array.from({ length: 2 * reach + 1 }, (_, at) => Math.exp(-(((at - reach) / (share * side)) ** 2) / 2));
    const total = weights.reduce((sum, weight) => sum + weight);
    const inside = (at) => Math.min(Math.max(at, 0), side - 1);
    for (const [along, across] of [[4, 4 * side], [4 * side, 4]]) {
      const before = Float32Array.from(image.data);
      for (let line = 0; line < side; line++) {
        for (let at = 0; at < side; at++) {
          for (let channel = 0; channel < 3; channel++) {
            let sum = 0;
            for (let k = -reach; k <= reach; k++) sum += weights[k + reach] * before[line * across + inside(at + k) * along + channel];
            image.data[line * across + at * along + channel] = sum / total;
          }
        }
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // Traces the border of a set of cells, so that it shows on any photo.
  function outline(context, cells, dashed) {
    const { width, height } = context.canvas;
    const [rows, columns] = [viewer.chosen().map.length, viewer.chosen().map[0].length];
    const isIn = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns && cells.includes(row * columns + column);
    const thin = Math.max(width / 250, 1);
    context.beginPath();
    const line = (x, y, toX, toY) => {
      const [left, top, right, bottom] = [x, y, toX, toY].map((at, k) => {
        const [parts, size] = k % 2 ? [rows, height] : [columns, width];
        return Math.min(Math.max((at * size) / parts, 2 * thin), size - 2 * thin); // inside the frame
      });
      context.moveTo(left, top);
      context.lineTo(right, bottom);
    };
    for (const cell of cells) {
      const [row, column] = [Math.floor(cell / columns), cell % columns];
      if (!isIn(row - 1, column)) line(column, row, column + 1, row);
      if (!isIn(row + 1, column)) line(column, row + 1, column + 1, row + 1);
      if (!isIn(row, column - 1)) line(column, row, column, row + 1);
      if (!isIn(row, column + 1)) line(column + 1, row, column + 1, row + 1);
    }
    for (const [color, thickness] of [["#000", 4], ["#fff", 2]]) {
      context.setLineDash(dashed && color === "#fff" ? [6 * thin, 4 * thin] : []);
      context.lineCap = dashed ? "butt" : "square";
      [context.strokeStyle, context.lineWidth] = [color, thickness * thin];
      context.stroke();
    }
  }

  function drawCovered(canvas, { cells, blur: share }) {
    const context = canvas.getContext("2d");
    const { width, height } = canvas;
    const [rows, columns] = [viewer.chosen().map.length, viewer.chosen().map[0].length];
    context.drawImage(photo, 0, 0, width, height);
    context.save();
    context.beginPath();
    for (const cell of cells) {
      context.rect(((cell % columns) * width) / columns, (Math.floor(cell / columns) * height) / rows, width / columns, height / rows);
    }
    context.clip();
    context.drawImage(blur(share), 0, 0, width, height);
    context.restore();
    outline(context, cells, false);
  }

  function draw() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [Math.round(frame.clientWidth * ratio), Math.round(frame.clientHeight * ratio)];
    if (!word || !width || !height) return;
    Object.assign(layer, { width, height }); // which also clears it
    if (result && photo.naturalWidth) {
      drawCovered(layer, result.cover);
      const scale = 176 / Math.max(width, height);
      drawCovered(Object.assign(find(".small"), { width: Math.round(width * scale), height: Math.round(height * scale) }), result.cover);
    }
    if (planning) outline(layer.getContext("2d"), hottest(), true);
  }

  // ---- The result in words and bars.
  function chance(text, number, range) {
    const row = make("li", range ? "chance of-random" : "chance");
    const { before, after, random } = result.cover;
    const largest = Math.max(before, after, random.high, 1e-9);
    const track = make("span", "track");
    track.style.setProperty("--share", number / largest);
    if (range) {
      track.style.setProperty("--low", range[0] / largest);
      track.style.setProperty("--high", range[1] / largest);
      track.append(make("span", "spread"));
    }
    row.append(make("span", "", text), make("span", "number", range ? `${percent(number)} (${range.map(percent).join(" to ")})` : percent(number)), track);
    return row;
  }

  function showResult() {
    const { cells, before, after, random } = result.cover;
    const { label, isEnd, words } = viewer.chosen();
    const these = cellsText(cells);
    const name = isEnd ? "the end of the caption" : `“${label}”`;
    const [was, is, left] = [before, after, random.mean].map(percent);
    const change = was === is ? `stays at ${was}` : `${after < before ? "falls" : "rises"} from ${was} to ${is}`;
    find(".finding").textContent = `Without ${these} ${name} ${change}; a random cover of equal size leaves ${left}.`;
    find(".chances").replaceChildren(
      chance("Whole photo", before),
      chance(`Without ${these}`, after),
      chance(`Random covers, mean of ${random.covers} (lowest to highest)`, random.mean, [random.low, random.high]),
    );
    const [{ words: anew }] = result.caption.beams;
    const isSame = anew.map(({ text }) => text).join(" ") === words.join(" ");
    find(".anew-title").textContent = isSame
      ? "The model still writes the same caption:"
      : "The model now writes (new words underlined):";
    const text = Object.assign(find(".anew-text"), { dir: "auto", lang: result.caption.language });
    text.replaceChildren(...anew.flatMap((each) => [make(words.includes(each.text) ? "span" : "strong", "", each.text), " "]));
    find(".outcome").textContent = after < random.low
      ? "The map passes: no random cover takes as much from the word."
      : after > before
        ? "The map fails: covering these cells helped the word. They don’t show it, or others show it better."
        : "Undecided: some random covers take as much. Other cells may show the same; try more cells.";
    find(".remark").textContent =
      "A random cover has the same shape, turned and moved anywhere, even over some of the same cells. " +
      "The decoder sees the photo through nothing but its cells, so covering any of them may take something from a word: " +
      "a fall is no proof that the map is right, unless the random covers leave the word standing.";
    badge.textContent = `${cells.length} of ${viewer.chosen().map.flat().length} cells covered`;
  }

  // ---- What the visitor does.
  function refresh() {
    const { selection } = viewer.chosen();
    const all = viewer.chosen().map.flat().length;
    find(".test output").textContent = `${count.value} of ${all} cells`;
    find(".cover-selected").textContent = `What if this were not there?${selection.length ? ` (${selection.length} selected)` : ""}`;
    find(".result").hidden = find(".uncover").hidden = !result;
    frame.classList.toggle("covered", Boolean(result));
    find(".test").ariaBusy = String(waiting);
    draw();
  }

  function uncover() {
    number++;
    result = null;
    waiting = false;
    find(".finding").textContent = "";
    if (word) refresh();
  }

  function update() {
    const { at, words, label, isEnd, mapTitle } = viewer.chosen();
    const chosen = JSON.stringify([photo.src, words, at, mapTitle]);
    if (word !== chosen) {
      word = chosen;
      find(".test-title").textContent = `Test the map “${mapTitle}” of ${isEnd ? "the end" : `“${label}”`}`;
      uncover();
    }
    refresh();
  }

  function cover(cells) {
    const { at, words } = viewer.chosen();
    waiting = true;
    number++;
    find(".finding").textContent = "Covering and captioning…";
    refresh();
    request({ request: number, text: words.join(" "), word: at, cells });
  }

  function answer(value) {
    if (value.request !== number) return;
    result = value;
    waiting = false;
    showResult();
    refresh();
    find(".result").scrollIntoView({ block: "nearest" });
  }

  find(".cover-hottest").addEventListener("click", () => cover(hottest()));
  find(".cover-selected").addEventListener("click", () => {
    const { selection, map } = viewer.chosen();
    if (selection.length && selection.length < map.flat().length) return cover(selection);
    find(".finding").textContent = selection.length
      ? "Leave at least one cell of the photo uncovered."
      : "First select what to cover: click cells of the photo or drag over them, or move there with Tab and select with Space.";
  });
  find(".uncover").addEventListener("click", () => {
    uncover();
    find(".cover-hottest").focus();
  });
  const plan = (is) => () => {
    planning = is;
    if (word) draw();
  };
  for (const type of ["pointerenter", "focusin"]) find(".hottest").addEventListener(type, plan(true));
  for (const type of ["pointerleave", "focusout"]) find(".hottest").addEventListener(type, plan(false));
  count.addEventListener("input", () => {
    planning = true;
    refresh();
  });
  photo.addEventListener("load", draw);
  new ResizeObserver(draw).observe(frame);
  return { update, answer, uncover };
}
