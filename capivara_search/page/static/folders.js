// The folder filter: a tree of all folders of the index, with the number of pictures in each folder. The tree is loaded
// when the user opens it.
import { byId, element, formatNumber, message, showError } from "./common.js";
import { ask } from "./source.js";

const [button, tree] = byId("folder").children;
let [chosenPath, onChoice] = ["", null];

/** Returns the last two names in a path, which usually suffice to tell folders apart. */
const shortName = (path) => path.split(/[\\/]/).filter(Boolean).slice(-2).join("/") || path;
const parentPath = (path) => path.slice(0, Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")));

/** Sets the function that is called when the user chooses a folder. Its argument is the path, or "" for all folders. */
export const onFolder = (callback) => (onChoice = callback);

/** Shows the chosen folder on the button of the filter. `path` is "" for all folders. */
export function showFolder(path) {
  chosenPath = path;
  button.lastElementChild.textContent = path ? shortName(path) : message("all_folders");
  button.title = path;
}

function folderButton(path, name, count) {
  const click = () => (tree.hidePopover(), onChoice(path));
  return element("button", { type: "button", title: path, "aria-current": path === chosenPath && "true", click }, element("span", {}, name), count);
}

async function fillTree() {
  const { folders } = await ask("folders").catch((error) => (showError(error), { folders: {} }));
  const subfolders = Map.groupBy(Object.keys(folders), (path) => (parentPath(path) in folders ? parentPath(path) : ""));
  const list = (parent) => element("ul", {}, ...(subfolders.get(parent) ?? []).map((path) => item(path, parent)));
  const item = (path, parent) => {
    const name = parent ? path.slice(parent.length + 1) : shortName(path);
    const node = element("li", {}, folderButton(path, name, element("span", {}, formatNumber(folders[path]))));
    if (!subfolders.has(path)) return node;
    const open = chosenPath.startsWith(`${path}/`) || (!parent && subfolders.get("").length === 1);
    node.append(element("details", { open }, element("summary", { "aria-label": message("folders_in", { name }) }), list(path)));
    return node;
  };
  tree.replaceChildren(folderButton("", message("all_folders")), list(""));
}

tree.addEventListener("toggle", (event) => (event.newState === "open" ? fillTree() : tree.replaceChildren()));
