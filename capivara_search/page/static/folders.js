// The choice of a folder of the index: a tree of all of them, with counts, that is asked for when it is opened.
import { element, find, notice, number, say } from "./common.js";
import { ask } from "./source.js";

const [button, tree] = find("folder").children;
let [chosen, choose] = ["", null];

/** The end of a path, as far as it tells folders apart well enough. */
const short = (path) => path.split(/[\\/]/).filter(Boolean).slice(-2).join("/") || path;
const above = (path) => path.slice(0, Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")));

/** Calls `take(path)` with a folder that is chosen, "" for all. */
export const onFolder = (take) => (choose = take);

/** Shows a folder as the chosen one. */
export function showFolder(path) {
  chosen = path;
  button.lastElementChild.textContent = path ? short(path) : say("all_folders");
  button.title = path;
}

function row(path, name, count) {
  const click = () => (tree.hidePopover(), choose(path));
  return element("button", { type: "button", title: path, "aria-current": path === chosen && "true", click }, element("span", {}, name), count);
}

async function fill() {
  const { folders } = await ask("folders").catch((error) => (notice(error), { folders: {} }));
  const inside = Map.groupBy(Object.keys(folders), (path) => (above(path) in folders ? above(path) : ""));
  const list = (parent) => element("ul", {}, ...(inside.get(parent) ?? []).map((path) => leaf(path, parent)));
  const leaf = (path, parent) => {
    const name = parent ? path.slice(parent.length + 1) : short(path);
    const made = element("li", {}, row(path, name, element("span", {}, number(folders[path]))));
    if (!inside.has(path)) return made;
    const open = chosen.startsWith(`${path}/`) || (!parent && inside.get("").length === 1);
    made.append(element("details", { open }, element("summary", { "aria-label": say("folders_in", { name }) }), list(path)));
    return made;
  };
  tree.replaceChildren(row("", say("all_folders")), list(""));
}

tree.addEventListener("toggle", (event) => (event.newState === "open" ? fill() : tree.replaceChildren()));
