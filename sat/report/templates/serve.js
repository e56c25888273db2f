
const [drop, file, state, error, answer] = ["drop", "file", "state", "error", "answer"].map(id => document.getElementById(id));
document.getElementById("url").textContent = location.origin;
let latest = 0;
async function send(picture) {
  const mine = ++latest;
  error.textContent = "";
  answer.replaceChildren();
  state.textContent = `${picture.name || "picture"}: looking …`;
  try {
    const reply = await fetch("caption", {method: "POST", body: picture, headers: {"Accept": "text/html", "Content-Type": "application/octet-stream"}});
    const text = await reply.text();
    if (mine !== latest) return;
    if (!reply.ok) throw new Error(JSON.parse(text).error);
    const shown = document.createElement("img");
    shown.alt = "the picture";
    shown.src = await dataUri(picture);
    answer.innerHTML = text;
    answer.prepend(shown);
    state.textContent = picture.name || "picture";
  } catch (problem) {
    if (mine !== latest) return;
    state.textContent = picture.name || "picture";
    error.textContent = problem instanceof TypeError ? "the server does not answer" : problem.message;
  }
}
function dataUri(blob) {
  return new Promise(done => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(blob);
  });
}
const first = transfer => [...transfer.files][0];
file.addEventListener("change", () => { if (file.files[0]) send(file.files[0]); file.value = ""; });
for (const kind of ["dragover", "dragenter"]) addEventListener(kind, event => { event.preventDefault(); drop.classList.add("over"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) drop.classList.remove("over"); });
addEventListener("drop", event => { event.preventDefault(); drop.classList.remove("over"); if (first(event.dataTransfer)) send(first(event.dataTransfer)); });
addEventListener("paste", event => { if (first(event.clipboardData)) send(first(event.clipboardData)); });
