// A choice of a folder of the index: a tree of all of them, with counts, that is asked for when it is opened.
import { ask, element, notice, number, say } from "./common.js";

/** The end of a path, as far as it tells folders apart well enough. */
const short = (path) => path.split(/[\\/]/).filter(Boolean).slice(-2).join("/") || path;
const above = (path) => path.slice(0, Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")));

/**
 * Fills the popover of `place`, whose other child is its button; `none`: what is said where no folder is chosen, and
 * `choose` is called with the path of one, "" for none. Returns what shows a path as chosen.
 */
export function folderChoice(place, none, choose) {
  const [button, tree] = place.children;
  let chosen = "";
  const show = (path) => {
    chosen = path;
    button.lastElementChild.textContent = path ? short(path) : none;
    button.title = path;
  };
  const take = (path) => (tree.hidePopover(), show(path), choose(path));
  const row = (path, name, n) => {
    const count = n == null ? null : element("span", { class: "count" }, number(n));
    return element("button", { type: "button", title: path, "aria-current": path === chosen && "true", click: () => take(path) }, element("span", {}, name), count);
  };

  async function fill() {
    const { folders } = await ask("folders").catch((error) => (notice(error), { folders: {} }));
    const inside = Map.groupBy(Object.keys(folders), (path) => (above(path) in folders ? above(path) : ""));
    const list = (parent) => element("ul", {}, ...(inside.get(parent) ?? []).map((path) => leaf(path, parent)));
    const leaf = (path, parent) => {
      const name = parent ? path.slice(parent.length + 1) : short(path);
      const made = element("li", {}, row(path, name, folders[path]));
      if (!inside.has(path)) return made;
      const open = chosen.startsWith(`${path}/`) || (!parent && inside.get("").length === 1);
      const fold = element("details", { open }, element("summary", { "aria-label": say("folders_in", { name }) }));
      fold.addEventListener("toggle", () => fold.append(list(path)), { once: true });
      made.append(fold);
      return made;
    };
    tree.replaceChildren(row("", none), list(""));
  }

  tree.addEventListener("toggle", (event) => (event.newState === "open" ? fill() : tree.replaceChildren()));
  show("");
  return show;
}
