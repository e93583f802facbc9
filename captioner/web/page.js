// The page around the viewer: photos, steering, settings, undo, links, export, the tour.
// It holds all of the page's state: the event "caption" sends the server all that it needs.
//
// mountPage(root, { caption, explain, explainSteps, cover, save, upload }) returns
// { start(value), answer(value), fail(), saved(text), failSteps(), uncover() }.
function mountPage(root, { caption, explain, explainSteps, cover, save, upload }) {
  const find = (selector) => root.querySelector(selector);
  const onClick = (selector, action) => find(selector).addEventListener("click", action);
  const MAX_BYTES = 1_000_000; // larger files are scaled down before the upload
  const MAX_SIDE = 2048;

  let examples = [];
  let defaults = {}; // search settings
  let plain = {};
  let state = null; // { example } or { path, url, name }, with { text, given, whole, settings }
  let value = null; // shown by the viewer
  let history = []; // [state, viewer state] before each change of the caption
  let number = 0; // of the latest request; answers to earlier ones are dropped
  let pending = null; // the state and view of the latest request
  let unanswered = 0; // requests

  const viewer = mountViewer(find(".viewer"), {
    rewrite: (words) => request({ ...state, ...words }),
    explain: (beam) => requestIdle(() => requestExplanation(beam)),
    changed: () => {
      writeAddress();
      chooseSteps();
      mapTest.update();
    },
    selected: () => mapTest.update(),
  });
  const mapTest = mountCover(root, viewer, (test) => {
    const { example = null, path: file = null, settings } = state;
    cover({ ...test, example, file, settings });
  });
  const steps = mountSteps(find(".steps"), { explain: explainSteps, move: (at) => find(".words").children[at].click() });

  const wordsOf = (text) => text.split(/\s+/).filter(Boolean);
  const samePhoto = (a, b) => a && b && a.example === b.example && a.path === b.path;
  const note = (text) => (find(".note").textContent = text);
  const busy = (is) => root.querySelector(".page").setAttribute("aria-busy", String(is));
  const release = ({ url }) => url.startsWith("blob:") && URL.revokeObjectURL(url);

  // ---- Requests.
  function request(next, view = {}) {
    pending = { next, view };
    number++;
    unanswered++;
    const { example = null, path: file = null, text, given, whole, settings, drawn = true } = next;
    busy(true);
    caption({ request: number, example, file, text, given, whole, settings, drawn });
  }

  // Asks for verdicts and further maps of one of the captions on the screen, once nothing else is to be done.
  const requestIdle = window.requestIdleCallback ?? ((action) => setTimeout(action, 50));
  function requestExplanation(beam) {
    if (!value || pending) return;
    const { example = null, path: file = null } = state;
    explain({ request: number, example, file, caption: value.caption, beam });
  }
  function takeExplanation(next) {
    // A request since then has replaced the caption, or is about to.
    if (next.request !== number || pending) return;
    value.caption = next.caption;
    viewer.explained(next.caption);
  }

  // Ignores the answer to a pending request; returns the number of the action that replaces it.
  function supersede() {
    pending = null;
    busy(false);
    return ++number;
  }

  // While a caption is on its way, its answer must not be overtaken in the component's value.
  function chooseSteps() {
    if (pending || !state) return;
    const { value, beam, word } = viewer.state();
    const words = value.caption.beams[beam].words.map(({ text }) => text);
    steps.choose({ example: state.example ?? null, file: state.path ?? null, words, word });
  }

  function answer(next) {
    if (next.explained) return takeExplanation(next);
    if (next.steps) return steps.show(next.request, next.steps);
    if (next.cover) return mapTest.answer(next);
    unanswered--;
    if (!pending || next.request !== number) return;
    const { next: answered, view } = pending;
    pending = null;
    busy(false);
    if (next.photo) answered.url = next.photo.url;
    // From here on the visitor's words are spelled as the model reads them.
    if (answered.given.length === wordsOf(answered.text).length) {
      const words = next.caption.beams[0].words.map((word) => word.text);
      answered.given = next.caption.given.filter((at) => at < words.length);
      answered.text = words.slice(0, answered.given.length).join(" ");
    }
    adopt(answered, { caption: next.caption, photo: { url: answered.url } }, view);
  }

  // A request failed, and Gradio shows why. If a later one is pending, its answer counts.
  function fail() {
    if (--unanswered > 0) return;
    if (pending && !samePhoto(pending.next, state)) release(pending.next);
    pending = null;
    busy(false);
    if (!value) return openExample(examples[0].name);
    fillForms();
    describePhoto();
    // The caption on the screen stays; the failed request came before its verdicts.
    const { beam } = viewer.state();
    if (!value.caption.beams[beam].end.verdict) requestExplanation(beam);
    chooseSteps();
  }

  // Makes an answered state the current one; Undo brings back the one before.
  function adopt(next, shown, view = {}) {
    history = samePhoto(state, next) ? [...history, [state, viewer.state()]] : [];
    restore(next, { ...shown, ...view });
  }

  function restore(next, shown) {
    const isNewPhoto = !samePhoto(state, next);
    if (state && isNewPhoto) release(state);
    [state, value] = [next, shown];
    viewer.show({ appearance: viewer.state().appearance, ...shown });
    fillForms();
    chooseSteps();
    describeChange();
    if (isNewPhoto) {
      describePhoto();
      exported("");
      // On a phone the photo may be far below the pressed button.
      if (find(".frame").getBoundingClientRect().top > window.innerHeight * 0.6) find(".viewer").scrollIntoView();
    }
    writeAddress();
  }

  function describeChange() {
    const { text, given, whole } = state;
    const words = wordsOf(text);
    const chosen = given.map((at) => `“${words[at]}”`).join(", ");
    const ending = whole ? "You ended the caption." : "The model wrote the rest.";
    find(".changed").hidden = !history.length && !given.length && !whole;
    find(".undo").hidden = !history.length;
    find(".changed-text").textContent = whole && given.length === words.length
      ? "The model scored your caption."
      : given.length ? `You chose ${chosen}. ${ending}` : whole ? ending : "";
  }

  onClick(".undo", () => {
    const [earlier, { value, beam, word }] = history.pop();
    supersede();
    restore(earlier, { ...value, beam, word });
    (find(".undo:not([hidden])") ?? find('.word[aria-pressed="true"]')).focus();
  });

  // ---- Photos.
  const fresh = (photo) => ({ ...photo, text: "", given: [], whole: false, settings: state?.settings ?? { ...defaults } });
  const isDefault = (settings) => Object.entries(defaults).every(([name, setting]) => settings[name] === setting);

  // The server captioned the examples with the default settings when it started.
  const answers = new Map();
  const fetchAnswer = ({ name, photo, answer }) => {
    if (!answers.has(name)) {
      new Image().src = photo.url;
      answers.set(name, fetch(answer.url).then((response) => response.json()));
      answers.get(name).catch(() => answers.delete(name));
    }
    return answers.get(name);
  };

  async function openExample(name, change = {}, view = {}) {
    const example = examples.find((each) => each.name === name) ?? examples[0];
    const next = { ...fresh({ example: example.name, url: example.photo.url }), ...change };
    const mine = supersede();
    if (next.text || next.whole || !isDefault(next.settings)) return request(next, view);
    busy(true);
    try {
      const shown = await fetchAnswer(example);
      if (mine !== number) return;
      busy(false);
      adopt(next, { caption: shown, photo: { url: next.url } }, view);
    } catch {
      if (mine === number) request(next, view);
    }
  }

  function exampleButton(example) {
    const node = Object.assign(document.createElement("button"), { type: "button", title: example.title });
    node.ariaLabel = `Example: ${example.title}`;
    node.append(Object.assign(new Image(), { src: example.thumbnail.url, alt: "" }));
    for (const event of ["pointerenter", "focus"]) node.addEventListener(event, () => fetchAnswer(example));
    node.addEventListener("click", () => openExample(example.name));
    return node;
  }

  function describePhoto() {
    const example = examples.find(({ name }) => name === state.example);
    note(example ? example.note : "");
    [...find(".examples").children].forEach((node, at) => (node.ariaPressed = String(examples[at] === example)));
  }

  // Returns a picture or a frame of a video as a JPEG.
  async function toJpeg(source, width, height) {
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, width, height);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
    return new File([blob], "photo.jpg", { type: "image/jpeg" });
  }

  // Scales a large photo down, so that one from a phone uploads fast, and is below the server's limit.
  async function shrink(file) {
    if (file.size <= MAX_BYTES) return file;
    try {
      const bitmap = await createImageBitmap(file); // upright: it follows the EXIF orientation
      const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
      const sides = [bitmap.width, bitmap.height].map((side) => Math.max(Math.round(side * scale), 1));
      const small = await toJpeg(bitmap, ...sides);
      bitmap.close();
      return small.size < file.size ? small : file;
    } catch {
      return file; // the browser can't read it; the server may
    }
  }

  const canDraw = (url) => Object.assign(new Image(), { src: url }).decode().then(() => true, () => false);

  async function openFile(original) {
    const mine = supersede();
    busy(true);
    note("Sending the photo…");
    try {
      const file = await shrink(original);
      if (file.size > 10_000_000) throw new Error("This file is larger than 10 MB, and your browser can't shrink it. Save it as a smaller JPEG and try again.");
      const url = URL.createObjectURL(file);
      const [sent, drawn] = await Promise.all([upload(file), canDraw(url)]);
      if (mine !== number) return URL.revokeObjectURL(url);
      if (!sent?.path) throw new Error();
      note("Writing a caption…");
      request({ ...fresh({ path: sent.path, url, name: original.name }), drawn });
    } catch (error) {
      if (mine !== number) return;
      busy(false);
      note(error.message?.endsWith(".") ? error.message : "The upload failed. Check your connection and try again.");
    }
  }

  onClick(".upload", () => find(".file").click());
  find(".file").addEventListener("change", ({ target }) => {
    if (target.files[0]) openFile(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  const onPaste = (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    const file = files.find(({ type, name }) => type.startsWith("image/") || /\.(heic|heif)$/i.test(name));
    if (!root.isConnected) document.removeEventListener("paste", onPaste);
    else if (file) openFile(file);
  };
  document.addEventListener("paste", onPaste);
  for (const type of ["dragover", "dragleave", "drop"]) {
    root.addEventListener(type, (event) => {
      event.preventDefault();
      find(".page").classList.toggle("dropping", type === "dragover");
      if (type === "drop" && event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
    });
  }

  // ---- The camera.
  const video = find("video");
  const closeCamera = () => {
    video.srcObject?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    find(".webcam").hidden = true;
  };
  find(".camera").hidden = !navigator.mediaDevices?.getUserMedia;
  onClick(".camera", async () => {
    if (video.srcObject) return closeCamera();
    find(".camera").disabled = true; // a second stream would stay on
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      return note("Your browser didn't allow access to a camera.");
    } finally {
      find(".camera").disabled = false;
    }
    find(".webcam").hidden = false;
    await video.play();
    find(".shoot").focus();
  });
  onClick(".shoot", async () => {
    if (!video.videoWidth) return;
    const photo = await toJpeg(video, video.videoWidth, video.videoHeight);
    closeCamera();
    find(".camera").focus();
    openFile(photo);
  });
  onClick(".close", closeCamera);

  // ---- Own words and settings.
  const own = find(".own");
  const form = find(".settings");
  function requestOwnWords(whole) {
    const words = wordsOf(own.elements.text.value);
    if (whole && !words.length) return own.elements.text.focus();
    request({ ...state, text: words.join(" "), given: [...words.keys()], whole });
  }
  own.addEventListener("submit", (event) => {
    event.preventDefault();
    requestOwnWords(false);
  });
  onClick(".score", () => requestOwnWords(true));

  const readSetting = ({ type, checked, valueAsNumber }) => (type === "checkbox" ? checked : valueAsNumber);
  const readSettings = () => Object.fromEntries(Object.keys(defaults).map((name) => [name, readSetting(form.elements[name])]));
  // A change keeps the visitor's words; the score of a caption does not depend on the search.
  function applySettings(settings) {
    if (!state.whole) return request({ ...state, settings });
    state = { ...state, settings };
    fillForms();
    writeAddress();
  }
  form.addEventListener("change", () => form.reportValidity() && applySettings(readSettings()));
  form.addEventListener("submit", (event) => event.preventDefault());
  onClick(".plain", () => applySettings({ ...state.settings, ...plain }));
  onClick(".default", () => applySettings({ ...defaults }));
  function fillForms() {
    for (const [name, setting] of Object.entries(state.settings)) {
      form.elements[name][typeof setting === "boolean" ? "checked" : "value"] = setting;
    }
    find(".link").disabled = !state.example;
    find(".link").title = state.example ? "" : "Links work only for the examples, because uploaded photos are deleted.";
  }

  // ---- The address: a link opens the same state.
  function writeAddress() {
    if (!state) return;
    const { beam, word, appearance, defaults: usual } = viewer.state();
    const words = wordsOf(state.text);
    const numbers = (settings) => Object.fromEntries(Object.entries(settings).map(([name, setting]) => [name, Number(setting)]));
    const parameters = (look) => ({
      map: look.map, special: Number(look.special), colors: look.colors, shape: look.shape, scale: look.scale, opacity: Math.round(100 * look.strength),
    });
    const omitted = { prefix: "", whole: 0, yours: String([...words.keys()]), beam: 1, ...parameters(usual), ...numbers(defaults) };
    const current = {
      example: state.example, prefix: state.text, whole: Number(state.whole),
      yours: String(state.given.filter((at) => at < words.length)),
      beam: beam + 1, word: word + 1, ...parameters(appearance), ...numbers(state.settings),
    };
    const url = new URL(location.href);
    for (const [name, parameter] of Object.entries(current)) {
      url.searchParams.delete(name);
      if (state.example && parameter !== omitted[name]) url.searchParams.append(name, parameter);
    }
    try {
      window.history.replaceState(window.history.state, "", url);
    } catch {
      // Browsers limit how often the address may change; the next change updates it.
    }
  }

  function readAddress() {
    const given = Object.fromEntries([...new URLSearchParams(location.search)].reverse()); // the first of each
    const words = wordsOf(given.prefix ?? "");
    const yours = given.yours === undefined ? [...words.keys()] : given.yours.split(",").filter(Boolean).map(Number);
    const settings = { ...defaults };
    for (const name of Object.keys(defaults).filter((name) => name in given)) {
      const input = form.elements[name];
      if (input.type === "checkbox") settings[name] = given[name] !== "0";
      else input.value = given[name];
      if (input.type === "number" && input.validity.valid) settings[name] = input.valueAsNumber;
    }
    const index = (text) => (/^[1-9]\d{0,3}$/.test(text) ? text - 1 : undefined);
    const opacity = Number(given.opacity ?? NaN) / 100;
    return {
      name: given.example,
      change: {
        text: words.join(" "), whole: given.whole === "1" && words.length > 0, settings,
        given: yours.filter((at) => Number.isInteger(at) && at >= 0 && at < words.length),
      },
      view: {
        beam: index(given.beam),
        word: index(given.word),
        appearance: {
          map: given.map, special: given.special === "1", colors: given.colors, shape: given.shape, scale: given.scale,
          ...(opacity >= 0 && opacity <= 1 && { strength: opacity }),
        },
      },
    };
  }

  // ---- Export.
  const exported = (text) => (find(".exported").textContent = text);
  const copy = (text, done) =>
    Promise.resolve(navigator.clipboard?.writeText(text) ?? Promise.reject()).then(
      () => exported(done),
      () => exported("Your browser didn't allow copying."),
    );
  onClick(".copy", () => copy(viewer.text(), "Caption copied."));
  onClick(".link", () => copy(location.href, "Link copied."));
  onClick(".export", ({ target: { dataset } }) => {
    if (!dataset.format) return;
    exported("Preparing…");
    const { beam, word, appearance } = viewer.state();
    const { example = null, path: file = null } = state;
    save({ format: dataset.format, example, file, caption: value.caption, beam, word, appearance });
  });

  // ---- The tour, on the current caption.
  const STEPS = [
    [".words", "A map for each word", "Point at a word, tap it, or use the arrow keys. The photo then shows what spoke for the word. The sign before its percentage tells where it comes from: ● seen there, ◐ from the scene, ○ from the sentence, ? guessed."],
    [".switch", "Four kinds of maps", "What each cell gave to the word, where the model looked, what the word would lose without the cell, and where its detector sees it. The key M switches, too."],
    [".alternatives", "The runners-up", "These were the most likely words at this position. Click one and the model rewrites the rest of the caption. Undo brings the old caption back."],
    [".test", "Test the map", "Cover the photo where the map is hottest, or the cells that you selected, and see what becomes of the word and of the caption."],
    [".frame", "Which words looked here?", "Click a cell of the photo, or drag over several. Each word then shows how much of its attention lies there."],
    [".captions", "Alternative captions", "The search kept these captions too, ranked by score. Choose one to see its own words and maps."],
    [".export", "Export", "Save the caption as an image, an animation, JSON or a web page that works offline, or copy a link to it."],
  ];
  let step = 0;
  const bubble = find(".bubble");
  function showStep(at) {
    if (at < 0) return;
    if (at === STEPS.length) return endTour();
    find(".in-tour")?.classList.remove("in-tour");
    step = at;
    const [selector, title, text] = STEPS[at];
    find("#tour-title").textContent = `${at + 1}/${STEPS.length} ${title}`;
    find(".bubble-text").textContent = text;
    find(".previous").disabled = at === 0;
    find(".next").textContent = at === STEPS.length - 1 ? "Done" : "Next";
    bubble.show();
    const target = find(selector);
    target.classList.add("in-tour");
    target.scrollIntoView({ block: "center" });
    const { top, bottom } = target.getBoundingClientRect();
    bubble.classList.toggle("above", (top + bottom) / 2 > window.innerHeight / 2);
    find(".next").focus({ preventScroll: true });
  }
  function endTour() {
    bubble.close();
    find(".in-tour")?.classList.remove("in-tour");
    find(".tour").focus();
  }
  onClick(".tour", () => showStep(0));
  onClick(".next", () => showStep(step + 1));
  onClick(".previous", () => showStep(step - 1));
  onClick(".finish", endTour);
  bubble.addEventListener("keydown", (event) => {
    if (event.key === "Escape") endTour();
    else if (event.key === "ArrowRight") showStep(step + 1);
    else if (event.key === "ArrowLeft") showStep(step - 1);
    else return;
    event.preventDefault();
  });

  // ---- Start.
  function start(first) {
    ({ examples, defaults, plain } = first);
    find(".examples").replaceChildren(...examples.map(exampleButton));
    const [{ name: firstName, photo: { url } }] = examples;
    answers.set(firstName, Promise.resolve(first.caption));
    const { name = firstName, change, view } = readAddress();
    const isPlain = !change.text && isDefault(change.settings);
    // The first example came with the page: it can be shown at once.
    if (name === firstName) restore(fresh({ example: firstName, url }), { caption: first.caption, photo: { url }, ...view });
    if (name !== firstName || !isPlain) openExample(name, change, view);
  }

  return { start, answer, fail, saved: exported, failSteps: steps.fail, uncover: mapTest.uncover };
}
