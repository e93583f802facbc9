// The page around the viewer: photos in, steering, settings, undo, links, export, the tour.
// All of its state is here; the server is asked with one event, "caption", that carries everything.
//
// mountPage(root, { caption, save, upload, resolve }) returns { start(value), answer(value), fail(), saved(name) }.
function mountPage(root, { caption, save, upload }) {
  const find = (selector) => root.querySelector(selector);
  const MAX_BYTES = 1_000_000; // larger files are scaled down before they are sent
  const MAX_SIDE = 2048;

  let examples = [];
  let defaults = {}; // search settings
  let plain = {};
  let state = null; // { example } or { path, url, name }, with { text, given, whole, settings }
  let value = null; // what the viewer shows
  let history = []; // [state, viewer state] before each change of the caption
  let number = 0; // of the latest request; answers to earlier ones are dropped
  let pending = null; // the state that the latest request asked for
  let unanswered = 0; // requests

  const viewer = mountViewer(find(".viewer"), {
    rewrite: (words) => request({ ...state, ...words }),
    changed: () => writeAddress(),
  });

  const samePhoto = (a, b) => a && b && a.example === b.example && a.path === b.path;
  const note = (text) => (find(".note").textContent = text);
  const busy = (is) => root.querySelector(".page").setAttribute("aria-busy", String(is));

  // ---- Asking for a caption.
  function request(next, view = {}) {
    pending = { next, view };
    number++;
    unanswered++;
    const { example, path, text, given, whole, settings, drawn } = next;
    busy(true);
    caption({ request: number, example: example ?? null, file: path ?? null, text, given, whole, settings, drawn: drawn ?? true });
  }

  function answer(next) {
    unanswered--;
    if (!pending || next.request !== number) return;
    const { next: asked, view } = pending;
    pending = null;
    busy(false);
    if (next.photo) asked.url = next.photo.url;
    // From here on the visitor's words are spelled as the model reads them.
    if (asked.given.length === asked.text.split(" ").filter(Boolean).length) {
      const words = next.caption.beams[0].words.map((word) => word.text);
      asked.given = next.caption.given.filter((at) => at < words.length);
      asked.text = words.slice(0, asked.given.length).join(" ");
    }
    adopt(asked, { caption: next.caption, photo: { url: asked.url } }, view);
  }

  // A request failed, and Gradio shows why. If a later one is on its way, its answer counts.
  function fail() {
    if (--unanswered > 0) return;
    if (pending && !samePhoto(pending.next, state)) release(pending.next);
    pending = null;
    busy(false);
    if (!value) return openExample(examples[0].name);
    fillForms();
    describePhoto();
  }
  const release = ({ url }) => url.startsWith("blob:") && URL.revokeObjectURL(url);

  // Makes an answered state the current one; the one before can be brought back.
  function adopt(next, shown, view = {}) {
    const changed = state && samePhoto(state, next);
    history = changed ? [...history, [state, { ...viewer.state() }]] : [];
    restore(next, { ...shown, ...view });
  }

  function restore(next, shown) {
    const arrived = !samePhoto(state, next);
    if (state && arrived) release(state);
    [state, value] = [next, shown];
    viewer.show({ appearance: viewer.state().appearance, ...shown });
    fillForms();
    describeChange();
    if (arrived) {
      describePhoto();
      find(".exported").textContent = "";
      // On a phone the stage may lie below what was pressed.
      if (find(".frame").getBoundingClientRect().top > window.innerHeight * 0.6) find(".viewer").scrollIntoView();
    }
    writeAddress();
  }

  function describeChange() {
    const { text, given, whole } = state;
    const count = text.split(" ").filter(Boolean).length;
    const chosen = given.map((at) => `“${text.split(" ")[at]}”`).join(", ");
    const own = whole ? "You ended the caption." : "The model wrote the rest.";
    find(".changed").hidden = !history.length && !given.length && !whole;
    find(".undo").hidden = !history.length;
    find(".changed-text").textContent = whole && given.length === count
      ? "The model scored your caption."
      : given.length ? `You chose ${chosen}. ${own}` : whole ? own : "";
  }

  find(".undo").addEventListener("click", () => {
    const [earlier, shown] = history.pop();
    number++; // an answer on its way is too late
    pending = null;
    busy(false);
    restore(earlier, { ...shown.value, beam: shown.beam, word: shown.word });
    find(".undo").hidden ? find('.word[aria-pressed="true"]').focus() : find(".undo").focus();
  });

  // ---- Photos.
  const fresh = (photo) => ({ ...photo, text: "", given: [], whole: false, settings: state?.settings ?? { ...defaults } });
  const isDefault = (settings) => Object.entries(defaults).every(([name, setting]) => settings[name] === setting);

  // Examples with the default settings were captioned when the server started.
  const answers = new Map();
  const fetchAnswer = (example) => {
    if (!answers.has(example.name)) {
      new Image().src = example.photo.url;
      answers.set(example.name, fetch(example.answer.url).then((response) => response.json()));
      answers.get(example.name).catch(() => answers.delete(example.name));
    }
    return answers.get(example.name);
  };

  async function openExample(name, change = {}, view = {}) {
    const example = examples.find((each) => each.name === name) ?? examples[0];
    const next = { ...fresh({ example: example.name, url: example.photo.url }), ...change };
    const mine = ++number;
    pending = null;
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

  function buildExamples() {
    find(".examples").replaceChildren(
      ...examples.map((example) => {
        const node = document.createElement("button");
        node.type = "button";
        node.setAttribute("aria-label", `Example: ${example.title}`);
        node.title = example.title;
        const image = new Image();
        image.src = example.thumbnail.url;
        image.alt = "";
        node.append(image);
        node.addEventListener("pointerenter", () => fetchAnswer(example));
        node.addEventListener("focus", () => fetchAnswer(example));
        node.addEventListener("click", () => openExample(example.name));
        return node;
      }),
    );
  }
  function describePhoto() {
    const example = examples.find(({ name }) => name === state.example);
    note(example ? example.note : "");
    [...find(".examples").children].forEach((node, at) => node.setAttribute("aria-pressed", String(examples[at] === example)));
  }

  // Scales a large photo down, so that one straight from a phone arrives soon, and arrives at all.
  async function shrink(file) {
    if (file.size <= MAX_BYTES) return file;
    let bitmap;
    try {
      bitmap = await createImageBitmap(file); // upright: it heeds the EXIF orientation
    } catch {
      return file; // the browser can't read it; the server may
    }
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height].map((side) => Math.max(Math.round(side * scale), 1));
    const context = canvas.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
    return blob && blob.size < file.size ? new File([blob], "photo.jpg", { type: "image/jpeg" }) : file;
  }

  const canDraw = async (url) => {
    const image = new Image();
    image.src = url;
    return image.decode().then(() => true, () => false);
  };

  async function bring(original) {
    const mine = ++number;
    pending = null;
    busy(true);
    note("Sending the photo…");
    try {
      const file = await shrink(original);
      if (file.size > 10_000_000) throw new Error("This file is larger than 10 MB, and the browser can't scale it down: save it as a JPEG first.");
      const url = URL.createObjectURL(file);
      const [sent, drawn] = await Promise.all([upload(file), canDraw(url)]);
      if (mine !== number) return URL.revokeObjectURL(url);
      if (!sent?.path) throw new Error("The photo did not arrive: check the connection and try again.");
      note("Writing a caption…");
      request({ ...fresh({ path: sent.path, url, name: original.name }), drawn });
    } catch (error) {
      if (mine !== number) return;
      busy(false);
      note(error.message?.endsWith(".") ? error.message : "The photo did not arrive: check the connection and try again.");
    }
  }

  find(".upload").addEventListener("click", () => find(".file").click());
  find(".file").addEventListener("change", (event) => {
    if (event.target.files[0]) bring(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  const photoIn = (items) => [...(items ?? [])].find((file) => file.type.startsWith("image/") || /\.(heic|heif)$/i.test(file.name));
  const onPaste = (event) => {
    const file = photoIn(event.clipboardData?.files);
    if (!root.isConnected) document.removeEventListener("paste", onPaste);
    else if (file) bring(file);
  };
  document.addEventListener("paste", onPaste);
  root.addEventListener("dragover", (event) => {
    event.preventDefault();
    find(".page").classList.add("dropping");
  });
  root.addEventListener("dragleave", () => find(".page").classList.remove("dropping"));
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    find(".page").classList.remove("dropping");
    const file = event.dataTransfer.files[0];
    if (file) bring(file);
  });

  // ---- The camera.
  let stream = null;
  const closeCamera = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    find(".webcam").hidden = true;
  };
  find(".camera").hidden = !navigator.mediaDevices?.getUserMedia;
  find(".camera").addEventListener("click", async () => {
    if (stream) return closeCamera();
    find(".camera").disabled = true; // a second stream would stay on
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      return note("The browser did not give access to a camera.");
    } finally {
      find(".camera").disabled = false;
    }
    find(".webcam").hidden = false;
    find("video").srcObject = stream;
    await find("video").play();
    find(".shoot").focus();
  });
  find(".shoot").addEventListener("click", () => {
    const video = find("video");
    if (!video.videoWidth) return;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => bring(new File([blob], "camera.jpg", { type: "image/jpeg" })), "image/jpeg", 0.92);
    closeCamera();
    find(".camera").focus();
  });
  find(".close").addEventListener("click", closeCamera);

  // ---- Own words and settings.
  const own = find(".own");
  const form = find(".settings");
  const typed = () => own.elements.text.value.trim().split(/\s+/).filter(Boolean);
  own.addEventListener("submit", (event) => {
    event.preventDefault();
    request({ ...state, text: typed().join(" "), given: typed().map((_, at) => at), whole: false });
  });
  find(".score").addEventListener("click", () => {
    if (!typed().length) return own.elements.text.focus();
    request({ ...state, text: typed().join(" "), given: typed().map((_, at) => at), whole: true });
  });

  const readSettings = () =>
    Object.fromEntries(
      Object.keys(defaults).map((name) => {
        const input = form.elements[name];
        return [name, input.type === "checkbox" ? input.checked : Number(input.value)];
      }),
    );
  // A change keeps the visitor's words; a scored caption is the same whatever the search.
  function applySettings(settings) {
    if (state.whole) {
      state = { ...state, settings };
      fillForms();
      writeAddress();
    } else {
      request({ ...state, settings });
    }
  }
  form.addEventListener("change", () => form.reportValidity() && applySettings(readSettings()));
  form.addEventListener("submit", (event) => event.preventDefault());
  find(".plain").addEventListener("click", () => applySettings({ ...state.settings, ...plain }));
  find(".default").addEventListener("click", () => applySettings({ ...defaults }));
  function fillForms() {
    for (const [name, setting] of Object.entries(state.settings)) {
      const input = form.elements[name];
      if (input.type === "checkbox") input.checked = setting;
      else input.value = setting;
    }
    find(".link").disabled = !state.example;
    find(".link").title = state.example ? "" : "A link can show examples only: your photo is not stored.";
  }

  // ---- The address: a link opens the same state.
  const FLAGS = { example: 1, prefix: 1, whole: 1, yours: 1, beam: 1, word: 1, colors: 1, map: 1, scale: 1, opacity: 1 };
  function writeAddress() {
    if (!state) return;
    const url = new URL(location.href);
    for (const name of [...Object.keys(FLAGS), ...Object.keys(defaults)]) url.searchParams.delete(name);
    if (state.example) {
      const { beam, word, appearance, defaults: plainLook } = viewer.state();
      const put = (name, setting, standard) => setting !== standard && url.searchParams.set(name, setting);
      put("example", state.example);
      put("prefix", state.text, "");
      put("whole", Number(state.whole), 0);
      const all = state.text.split(" ").filter(Boolean).map((_, at) => at).join(",");
      const yours = state.given.filter((at) => at < state.text.split(" ").length).join(",");
      put("yours", yours, all);
      put("beam", beam + 1, 1);
      put("word", word + 1);
      put("colors", appearance.colors, plainLook.colors);
      put("map", appearance.shape, plainLook.shape);
      put("scale", appearance.scale, plainLook.scale);
      put("opacity", Math.round(100 * appearance.strength), 100 * plainLook.strength);
      for (const [name, standard] of Object.entries(defaults)) put(name, Number(state.settings[name]), Number(standard));
    }
    try {
      window.history.replaceState(window.history.state, "", url);
    } catch {
      // Browsers limit how often the address may change; the next change brings it up to date.
    }
  }

  function readAddress() {
    const given = new URLSearchParams(location.search);
    const text = (given.get("prefix") ?? "").trim().replace(/\s+/g, " ");
    const words = text.split(" ").filter(Boolean);
    const whole = given.get("whole") === "1" && words.length > 0;
    const yours = given.has("yours") ? given.get("yours").split(",").filter(Boolean).map(Number) : words.map((_, at) => at);
    const settings = { ...defaults };
    for (const name of Object.keys(defaults)) {
      const input = form.elements[name];
      if (!given.has(name)) continue;
      if (input.type === "checkbox") settings[name] = given.get(name) !== "0";
      else input.value = given.get(name);
      if (input.type === "number" && input.validity.valid) settings[name] = Number(input.value);
    }
    const index = (name) => (Number.isInteger(Number(given.get(name))) && Number(given.get(name)) > 0 ? Number(given.get(name)) - 1 : undefined);
    const opacity = Number(given.get("opacity") ?? 75) / 100;
    return {
      name: given.get("example"),
      change: { text, whole, given: yours.filter((at) => Number.isInteger(at) && at >= 0 && at < words.length), settings },
      view: {
        beam: index("beam"),
        word: index("word"),
        appearance: {
          ...(given.has("colors") && { colors: given.get("colors") }),
          ...(["smooth", "cells"].includes(given.get("map")) && { shape: given.get("map") }),
          ...(["word", "caption"].includes(given.get("scale")) && { scale: given.get("scale") }),
          ...(opacity >= 0 && opacity <= 1 && { strength: opacity }),
        },
      },
    };
  }

  // ---- Export.
  const exported = (text) => (find(".exported").textContent = text);
  const copy = async (text, done) => {
    try {
      await navigator.clipboard.writeText(text);
      exported(done);
    } catch {
      exported("The browser did not let the page copy.");
    }
  };
  find(".copy").addEventListener("click", () => copy(viewer.text(), "Caption copied."));
  find(".link").addEventListener("click", () => copy(location.href, "Link copied."));
  root.querySelectorAll("[data-format]").forEach((node) =>
    node.addEventListener("click", () => {
      exported("Preparing…");
      const { beam, word, appearance } = viewer.state();
      save({ format: node.dataset.format, example: state.example ?? null, file: state.path ?? null, caption: value.caption, beam, word, appearance });
    }),
  );

  // ---- The tour, on whatever is shown.
  const STEPS = [
    [".words", "One map for each word", "Point at a word, tap it, or use the arrow keys: the photo shows where the model looked before it wrote that word."],
    [".panel", "The runners-up", "These words were the most likely at this place. Click another one: the model rewrites the rest of the caption. Undo takes it back."],
    [".frame", "Ask from the other side", "Click a cell of the photo, or drag over several: each word shows how much of its attention lies there."],
    [".captions", "Alternative captions", "The search kept these captions too, ranked by score. Choose one to see its own words and maps."],
    [".export", "Take it with you", "Save what is on the screen as a picture, an animation, numbers or a web page that works offline, or copy a link to it."],
  ];
  let step = 0;
  const bubble = find(".bubble");
  function showStep(at) {
    find(".in-tour")?.classList.remove("in-tour");
    step = at;
    const [selector, title, text] = STEPS[at];
    find("#tour-title").textContent = `${at + 1}/${STEPS.length} ${title}`;
    find(".bubble-text").textContent = text;
    find(".previous").disabled = at === 0;
    find(".next").textContent = at === STEPS.length - 1 ? "Done" : "Next";
    bubble.hidden = false;
    const target = find(selector);
    target.classList.add("in-tour");
    target.scrollIntoView({ block: "center" });
    const { top, bottom } = target.getBoundingClientRect();
    bubble.classList.toggle("above", (top + bottom) / 2 > window.innerHeight / 2);
    find(".next").focus({ preventScroll: true });
  }
  function endTour() {
    bubble.hidden = true;
    find(".in-tour")?.classList.remove("in-tour");
    find(".tour").focus();
  }
  find(".tour").addEventListener("click", () => showStep(0));
  find(".next").addEventListener("click", () => (step === STEPS.length - 1 ? endTour() : showStep(step + 1)));
  find(".previous").addEventListener("click", () => showStep(Math.max(step - 1, 0)));
  find(".finish").addEventListener("click", endTour);
  bubble.addEventListener("keydown", (event) => {
    if (event.key === "Escape") endTour();
    else if (event.key === "ArrowRight") find(".next").click();
    else if (event.key === "ArrowLeft") find(".previous").click();
    else return;
    event.preventDefault();
  });

  // ---- Start.
  function start(first) {
    ({ examples, defaults, plain } = first);
    buildExamples();
    answers.set(examples[0].name, Promise.resolve(first.caption));
    const { name, change, view } = readAddress();
    const asked = name || change.text || !isDefault(change.settings);
    // The first example came with the page: nothing has to be waited for.
    if (!asked || name === examples[0].name) {
      restore(fresh({ example: examples[0].name, url: examples[0].photo.url }), { caption: first.caption, photo: { url: examples[0].photo.url }, ...view });
      if (!change.text && isDefault(change.settings)) return;
    }
    openExample(name ?? examples[0].name, change, view);
  }

  return { start, answer, fail, saved: exported };
}
