// A question, its answers, and the one that was chosen before the result was seen.

function render({ model, el }) {
  const root = mount(model, el, "Prediction"), name = `wikidpo-${Date.now()}-${serial++}`;
  const stored = h("p", { role: "status", class: "quiet" });
  const choices = model.get("options").map(option => {
    const input = h("input", { type: "radio", name, value: option, onchange: () => send(model, { answer: option }) });
    return { option, input, label: h("label", {}, input, " ", visible(option)) };
  });
  put(root, {}, [
    h("fieldset", { class: "row" }, h("legend", {}, h("b", {}, visible(model.get("question")))), ...choices.map(c => c.label)),
    stored]);

  function show() {
    const answer = model.get("answer");
    for (const { option, input } of choices) input.checked = option == answer;
    stored.textContent = answer ? `Stored: ${visible(answer)}. The lesson comes back to it.` : "Choose before you read on.";
  }
  model.on("change:answer", show);
  show();
}
export default { render };
