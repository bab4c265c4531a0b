"""What is written beside an ONNX model: a page that generates in a browser, and decode.js, which makes
text of ids as tokenmonster_hf does."""

# A copy beside the page does too. The tests run `decode` in Node, without this
# runtime; it was run there once by hand (Node 20, WASM, a random model): `generate` gave the ids of
# OnnxModel.greedy for 20 of 20 prompts, fp32 and int8. In a browser nothing was tried.
RUNTIME = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.23.2/dist/ort.wasm.min.mjs"

DECODE_JS = r"""// ids -> text, with model.json. capcode 0: the tokens' bytes; 1: byte 7F takes itself and the next
// byte out; 2: C makes the next letter upper case, W the word, D takes the next character out.
export function decode(model, ids) {
  const joined = ids.map((id) => model.tokens[id] ?? "").join("");
  let bytes = Uint8Array.from(joined, (char) => char.charCodeAt(0));
  if (model.capcode === 1) {
    const kept = [];
    let drop = false;
    for (const byte of bytes) {
      const mark = byte === 0x7f && !drop;
      if (!drop && byte !== 0x7f) kept.push(byte);
      drop = mark;
    }
    bytes = Uint8Array.from(kept);
  }
  const text = new TextDecoder(model.encoding).decode(bytes);
  return model.capcode === 2 ? upperCase(text) : text;
}

function upperCase(text) {
  let out = "", one = false, word = false, drop = false, fresh = false;
  for (const char of text) {
    if (char === "C") { one = true; word = false; continue; }
    if (char === "W") { one = false; word = true; fresh = true; continue; }
    if (char === "D") { drop = true; continue; }
    if (drop) {
      drop = false;
    } else if (char === " ") {
      out += " ";
      if (!fresh) word = false;
    } else {
      const letter = /[\p{Lu}\p{Ll}]/u.test(char), upper = char.toUpperCase();
      if (one || (word && letter)) {
        out += [...upper].length === 1 ? upper : char;
        one = false;
      } else {
        if (!/[\p{N}\p{M}'\u2019]/u.test(char)) word = false;
        out += char;
      }
    }
    fresh = false;
  }
  return out;
}

// Greedy continuation of ids; ort: onnxruntime-web, or onnxruntime-node; session: of model.onnx.
export async function generate(ort, session, model, ids, newTokens, show = () => {}) {
  const past = {}, found = [];
  for (let layer = 0; layer < model.layers; layer++)
    for (const part of ["key", "value"])
      past[`past.${layer}.${part}`] =
        new ort.Tensor("float32", new Float32Array(0), [1, model.kv_heads, 0, model.head_dim]);
  let next = ids;
  while (found.length < newTokens && ids.length + found.length < model.context) {
    const input = new ort.Tensor("int64", BigInt64Array.from(next, BigInt), [1, next.length]);
    const out = await session.run({ input_ids: input, ...past });
    const rows = out.logits.dims[2], last = out.logits.data.subarray(-rows);
    let best = 0;
    for (let i = 1; i < rows; i++) if (last[i] > last[best]) best = i;
    if (best === model.eos_token_id) break;
    found.push(best);
    show(found);
    next = [best];
    for (const name of Object.keys(past)) past[name] = out[name.replace("past", "present")];
  }
  return found;
}
"""

PAGE = f"""<!doctype html>
<meta charset="utf-8"><title>A Stentor model in the browser</title>
<!-- python -m http.server in this folder, then http://localhost:8000. The tokenizer is Python: ids
     come from tokenizer("The history of", add_special_tokens=False)["input_ids"]. -->
<h1>A Stentor model in the browser</h1>
<p><label>Prompt, as token ids: <input id="ids" size="60" value="0"></label>
   <button id="go" disabled>Generate</button></p>
<pre id="text" style="white-space:pre-wrap"></pre>
<script type="module">
import * as ort from "{RUNTIME}";
import {{ decode, generate }} from "./decode.js";
const at = (id) => document.getElementById(id);
const model = await (await fetch("model.json")).json();
const session = await ort.InferenceSession.create("model.onnx");
at("go").disabled = false;
at("go").onclick = async () => {{
  const ids = at("ids").value.match(/\\d+/g).map(Number);
  await generate(ort, session, model, ids, 100, (found) => {{
    at("text").textContent = decode(model, [...ids, ...found]);
  }});
}};
</script>
"""
