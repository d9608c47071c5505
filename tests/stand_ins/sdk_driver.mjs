// Runs one JavaScript program of docs/integrations.md unchanged, as sdk_driver.py does with those in Python.
// Arguments: a folder with NAME.mjs for each call, and calls.json: {query, calls: {NAME: documents}}.
// stdout: {NAME: {lines} or {error, text}}. The programs use the globals query and documents.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const given = JSON.parse(readFileSync(`${folder}/calls.json`, "utf8"));
const print = console.log;
const out = {};
for (const [name, documents] of Object.entries(given.calls)) {
  const lines = [];
  console.log = (score, text) => lines.push([score, text]);
  Object.assign(globalThis, { query: given.query, documents });
  try {
    await import(pathToFileURL(`${folder}/${name}.mjs`));
    out[name] = { lines };
  } catch (error) {
    out[name] = { error: error.name, text: String(error.message) };
  }
}
print(JSON.stringify(out));
