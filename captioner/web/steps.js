// "How this word was chosen": draws the numbers of one step of the decoder, from the query to the probabilities.
// Text from the server is set as text, never as HTML.
//
// mountSteps(root, { explain, move }) returns { choose(question), show(request, steps), fail() }.
//   root: a <details>; nothing is requested while it is closed.
//   explain({ request, ...question }): requests the steps of a word; `request` comes back with them.
//   move(at): chooses another word of the caption.
//   choose({ words, word, ... }): the visitor chose this word of these; words.length is the end.
//   show(request, steps): WordSteps.to_dict() of captioner/model/steps.py; answers to earlier requests are dropped.
function mountSteps(root, { explain, move }) {
  const DELAY = 120; // milliseconds, so that walking along the words requests few of them
  const SIDE = 7;
  const find = (selector) => root.querySelector(selector);
  const make = (name, className, ...children) => {
    const node = Object.assign(document.createElement(name), { className });
    node.append(...children);
    return node;
  };

  // ---- Numbers and symbols.
  const number = (value, digits = 2) => value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
  const exact = (value) => number(value, 4); // for factors, so that products can be checked by hand
  const signed = (value) => (value < 0 ? number(value) : `+${number(value)}`);
  const sum = (a, b) => `${number(a)} ${b < 0 ? "−" : "+"} ${number(Math.abs(b))} = ${number(a + b)}`;
  const percent = (share) => `${(share * 100).toFixed(1)}%`;
  const SPECIAL = { __proto__: null, "<bos>": "(start)", "<eos>": "(end)", "<unk>": "(unknown word)" };
  const display = (text) => SPECIAL[text] ?? text;
  // Isolated: a word of a right-to-left script must not reorder the sentence around it.
  const quoted = (text) => `“\u2068${display(text)}\u2069”`;
  const many = (count) => count.toLocaleString("en");
  // Sets "e_{i}" as e with the subscript i.
  const math = (text) =>
    text.split(/(_\{.*?\})/).map((part) => (part.startsWith("_{") ? make("sub", "", part.slice(2, -1)) : part));
  const equation = (...lines) => make("div", "equation", ...lines.map((line) => make("div", "", ...math(line))));

  // ---- Parts of a step.
  const sentence = (...parts) => make("p", "", ...parts);
  const result = (...lines) => make("div", "result", ...lines.map((line) => make("div", "", ...math(line))));
  const bar = (label, share) => {
    const node = make("div", "bar", make("span", "", ...math(label)), make("span", "number", number(share)));
    node.style.setProperty("--share", share);
    return node;
  };
  // The cells as on the photo, the darker the larger.
  function grid(className, caption, values, format) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const cell = (value) => {
      const node = make("td", value === high ? "largest" : "", format(value));
      node.style.setProperty("--heat", (value - low) / Math.max(high - low, 1e-9));
      return node;
    };
    const rows = Array.from({ length: values.length / SIDE }, (_, row) =>
      make("tr", "", ...values.slice(row * SIDE, (row + 1) * SIDE).map(cell)));
    return make("table", `cells-table ${className}`, make("caption", "", caption), make("tbody", "", ...rows));
  }
  const place = (at) => `row ${Math.floor(at / SIDE) + 1}, column ${(at % SIDE) + 1}`;

  // ---- The steps. Each returns what stands on the left and on the right; a model may lack some.
  const STEPS = {
    query: ["The query", ({ sizes, previous, hidden_before, word_norm, query }) => {
      const reads = sizes.query > sizes.hidden;
      const state = `its state h, ${sizes.hidden} numbers that sum up the words before the last one and what was read of the photo for them`;
      return [
        [
          sentence(reads
            ? `What to look for? The decoder asks with ${state}. The last word, ${quoted(previous)}, has not entered it yet, so its ${sizes.word} numbers x come along.`
            : `What to look for? The decoder asks with ${state}.`),
          equation(reads ? "q = [h_{t−1} ; x]" : "q = h_{t−1}"),
        ],
        [result(`‖h_{t−1}‖ = ${number(hidden_before)}${hidden_before ? "" : ", nothing is written yet"}`, ...(reads ? [`‖x‖ = ${number(word_norm)}`, `‖q‖ = ${number(query)}`] : []))],
      ];
    }],
    scores: ["A score for each cell", ({ scores, projected_query }) => [
      [
        sentence(`The query is compared with the vector f of each of the ${scores.length} cells. The better a cell fits, the higher its score.`),
        equation("e_{i} = v · tanh(W_{f} f_{i} + W_{h} q + b)"),
      ],
      [
        result(`‖W_{h} q + b‖ = ${number(projected_query)}`),
        grid("scores", `${scores.length} scores, laid out as on the photo`, scores, (value) => number(value, 1)),
      ],
    ]],
    attention: ["Softmax: the shares of attention", ({ scores, attention }) => {
      const top = attention.indexOf(Math.max(...attention));
      const total = scores.reduce((all, score) => all + Math.exp(score), 0);
      return [
        [
          sentence("Softmax makes shares of the scores: all are positive, and they sum to 1. This is the map “Attended”. Each extra point of score multiplies a share by e ≈ 2.72."),
          equation("α_{i} = exp(e_{i}) / Σ_{j} exp(e_{j})"),
        ],
        [
          grid("shares", `${attention.length} shares in %; together ${percent(attention.reduce((a, b) => a + b, 0))}`, attention, (share) => number(100 * share, 1)),
          result(
            `Σ_{j} exp(e_{j}) = ${number(total)}`,
            `The largest, ${place(top)}: exp(${exact(scores[top])}) / ${number(total)} = ${number(Math.exp(scores[top]))} / ${number(total)} = ${percent(attention[top])}`,
          ),
        ],
      ];
    }],
    context: ["The weighted mean", ({ sizes, context }) => [
      [
        sentence(`The cells’ vectors are averaged, each weighted by its share. The mean, ${sizes.context} numbers, is what the LSTM reads of the photo.`),
        equation("z = Σ_{i} α_{i} f_{i}"),
      ],
      [result(`‖z‖ = ${number(context)}`)],
    ]],
    gate: ["The gate", ({ gate, context, code }) => [
      [
        sentence(`One number between 0 and 1 scales that mean before the LSTM${code.deep ? " and the output layer read" : " reads"} it: near 0 the sentence so far decides.${code.evidence || code.pointer ? " What the detectors see and the backbone recognizes passes this gate by." : ""}`),
        equation("β = σ(w_{β} · h_{t−1})", "z′ = β z"),
      ],
      [bar("β", gate), result(`‖z′‖ = ${exact(gate)} × ${number(context)} = ${number(gate * context)}`)],
    ]],
    lstm: ["The LSTM", ({ sizes, code, input_gate, forget_gate, output_gate, cell_before, cell, cell_change, hidden }) => {
      const inputs = `[x ; ${code.gate ? "z′" : "z"} ; h_{t−1}]`;
      return [
        [
          sentence(`The memory c takes in the last word and the photo. The forget gate sets how much of the old memory stays, the input gate how much of the new enters, the output gate how much of it shows in the next state h. Each has ${sizes.hidden} values between 0 and 1.`),
          equation(
            `in, forget, out = σ(W ${inputs})`,
            `new = tanh(W_{n} ${inputs})`,
            "c_{t} = forget ⊙ c_{t−1} + in ⊙ new",
            "h_{t} = out ⊙ tanh(c_{t})",
          ),
        ],
        [
          bar("in, mean", input_gate),
          bar("forget, mean", forget_gate),
          bar("out, mean", output_gate),
          result(
            `‖c_{t−1}‖ = ${number(cell_before)}, ‖c_{t}‖ = ${number(cell)}`,
            `‖c_{t} − c_{t−1}‖ = ${number(cell_change)}`,
            `‖h_{t}‖ = ${number(hidden)}`,
          ),
        ],
      ];
    }],
    output: ["The output layer", ({ sizes, code }, chosen) => [
      [
        sentence(
          `Every one of the ${many(sizes.vocabulary)} words gets a number, its logit, from the new state` +
          (code.deep ? ", the weighted mean and the last word. The higher, the better the word continues the sentence." : ". The higher, the better the word fits."),
        ),
        code.deep ? equation(`u = W_{1} h_{t} + W_{2} ${code.gate ? "z′" : "z"} + x`, "logit_{w} = V_{w} · u") : equation("logit_{w} = V_{w} · h_{t}"),
      ],
      [
        result(`${quoted(chosen.text)}: ${number(chosen.output)}`),
        ...(chosen.is_unwritten
          ? [sentence("No caption in training held this word, so its logit is fixed, far below all others. Only the pointer can write it.")]
          : []),
      ],
    ]],
    evidence: ["What the detectors see", ({ evidence_gain }, chosen) => [
      [
        sentence(...math("Word detectors have learned from captions to recognize a word in a cell. Each adds to its own word what it sees in the attended cells: d_{iw} is what the detector of word w sees in cell i, above or below an average cell. The map “Evidence” shows each cell’s part.")),
        equation("logit_{w} += γ Σ_{i} α_{i} d_{iw}", "γ = softplus(w_{γ} · h_{t})"),
      ],
      [
        result(
          `γ = ${exact(evidence_gain)}`,
          ...(chosen.seen === null
            ? [`${quoted(chosen.text)} has no detector: +0`]
            : [
              `Σ_{i} α_{i} d_{iw} = ${exact(chosen.seen)} for ${quoted(chosen.text)}`,
              `γ Σ_{i} α_{i} d_{iw} = ${exact(evidence_gain)} × ${exact(chosen.seen)} = ${signed(chosen.evidence)}`,
            ]),
          `${quoted(chosen.text)}: ${sum(chosen.output, chosen.evidence)}`,
        ),
      ],
    ]],
    pointer: ["What the backbone recognizes", ({ pointer_gate, pointer_scale }, chosen) => {
      const written = chosen.output + chosen.evidence;
      const pointed = pointer_scale * Math.log(Math.max(chosen.named, 1e-20)) + pointer_gate;
      return [
        [
          sentence(...math("The backbone, the network that made the cells, was trained to name things. The pointer lets the caption use its names: p_{w} is the probability that the attended cells show what w names, and g = w_{g} · h_{t} + b rates how well a name fits here. The map “Evidence” divides what this adds among the cells, too.")),
          equation("logit_{w} = ln(exp(logit_{w}) + exp(s ln p_{w} + g))"),
        ],
        [
          result(
            `s = ${exact(pointer_scale)}, g = ${exact(pointer_gate)}`,
            ...(chosen.named === null
              ? [`${quoted(chosen.text)} is no name that fits here: +0`]
              : [
                `p_{w} = ${percent(chosen.named)} for ${quoted(chosen.text)}`,
                `s ln p_{w} + g = ${exact(pointed)}`,
                `ln(exp(${exact(written)}) + exp(${exact(pointed)})) = ${number(chosen.logit)}`,
              ]),
            `${quoted(chosen.text)}: ${sum(written, chosen.pointer)}`,
          ),
        ],
      ];
    }],
    softmax: ["The probabilities", (steps, chosen) => [
      [
        sentence(`Softmax once more, over the logits of all ${many(steps.sizes.vocabulary)} words.`),
        equation("p(w) = exp(logit_{w}) / Σ_{v} exp(logit_{v})"),
        ...(chosen === steps.candidates[0]
          ? []
          : [sentence(`${quoted(steps.candidates[0].text)} was likelier here. The search compares whole captions, not single words; or you chose the word.`)]),
      ],
      [
        candidatesTable(steps, chosen),
        result(
          `ln Σ_{v} exp(logit_{v}) = ${exact(steps.log_sum_exp)}`,
          `${quoted(chosen.text)}: exp(${exact(chosen.logit)} − ${exact(steps.log_sum_exp)}) = exp(${exact(chosen.logit - steps.log_sum_exp)}) = ${percent(chosen.probability)}`,
        ),
      ],
    ]],
  };

  function candidatesTable({ candidates, code }, chosen) {
    const parts = [["evidence", "+ seen"], ["pointer", "+ named"]].filter(([name]) => code[name]);
    const head = (text) => Object.assign(make("th", "", text), { scope: "col" });
    const row = (each) => {
      const word = Object.assign(make("th", "", make("bdi", "", display(each.text))), { scope: "row" });
      if (each === chosen) word.append(" ", make("span", "tag", "chosen"));
      return make(
        "tr", each === chosen ? "chosen" : "", word,
        ...(parts.length ? [make("td", "", number(each.output))] : []),
        ...parts.map(([name]) => make("td", "", signed(each[name]))),
        make("td", "", number(each.logit)),
        make("td", "", percent(each.probability)),
      );
    };
    const names = [...(parts.length ? ["output"] : []), ...parts.map(([, name]) => name), parts.length ? "= logit" : "logit", "p(w)"];
    return make(
      "table", "candidates",
      make("caption", "", "The likeliest words; numbers are rounded"),
      make("thead", "", make("tr", "", head("word"), ...names.map(head))),
      make("tbody", "", ...candidates.map(row)),
    );
  }

  const codeLine = ({ file, line, text }) => make("div", "code", make("span", "", `${file}:${line}`), make("code", "", text));

  function draw(steps) {
    const chosen = steps.candidates.find(({ text }) => text === steps.word);
    find(".steps-list").replaceChildren(...Object.entries(STEPS).filter(([name]) => steps.code[name]).map(([name, [title, parts]]) => {
      const [left, right] = parts(steps, chosen);
      const code = [...(name === "output" ? steps.code.deep ?? [] : []), ...steps.code[name]].map(codeLine);
      return make("li", `step ${name}`, make("h3", "", title), make("div", "words-of-step", ...left), make("div", "numbers-of-step", ...right), make("div", "code-of-step", ...code));
    }));
  }

  // ---- Requests.
  let question = null;
  let asked = ""; // what the latest request was about
  let request = 0;
  let timer = null;
  const busy = (is) => (find(".steps-list").ariaBusy = String(is));

  function ask() {
    clearTimeout(timer);
    if (!root.open || !question || JSON.stringify(question) === asked) return;
    busy(true);
    timer = setTimeout(() => {
      asked = JSON.stringify(question);
      explain({ request: ++request, ...question });
    }, DELAY);
  }

  function choose(next) {
    question = next;
    find(".earlier").disabled = next.word === 0;
    find(".later").disabled = next.word === next.words.length;
    ask();
  }

  function show(number, steps) {
    if (number !== request) return;
    busy(false);
    const before = question.words.slice(0, question.word).map(display).join(" ");
    find(".steps-title").textContent = before
      ? `After “\u2068${before}\u2069”, the next word is ${quoted(steps.word)}.`
      : `The first word is ${quoted(steps.word)}.`;
    draw(steps);
  }

  // Gradio shows why.
  function fail() {
    busy(false);
    asked = "";
  }

  root.addEventListener("toggle", ask);
  find(".earlier").addEventListener("click", () => move(question.word - 1));
  find(".later").addEventListener("click", () => move(question.word + 1));
  return { choose, show, fail };
}
