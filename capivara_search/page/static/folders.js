// A choice of a folder of the index: a tree of all of them, with counts, that is asked for when it is opened.
import { ask, element, notice, number, say } from "./common.js";

/** The end of a path, as far as it tells folders apart well enough. */
const short = (path) => path.split(/[\\/]/).filter(Boolean).slice(-2).join("/") || path;
const above = (path) => path.slice(0, Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")));

/**
 * Makes a tree of `details`, a summary and a place for it; `none`: what is said where no folder is chosen, and `choose`
 * is called with the path of one, "" for none. Returns what shows a path as chosen.
 */
export function folderChoice(details, none, choose) {
  const [summary, tree] = details.children;
  let chosen = "";
  const show = (path) => {
    chosen = path;
    summary.lastElementChild.textContent = path ? short(path) : none;
    summary.title = path;
  };
  const close = () => (details.open = false);
  const take = (path) => {
    close();
    summary.focus();
    show(path);
    choose(path);
  };

  const button = (path, name, n) => {
    const count = n == null ? null : element("span", { class: "count" }, number(n));
    return element("button", { type: "button", title: path, "aria-current": path === chosen && "true", click: () => take(path) }, element("span", {}, name), count);
  };

  async function fill() {
    if (!details.open) return tree.replaceChildren();
    const { folders } = await ask("folders").catch((error) => (notice(error), close(), { folders: {} }));
    if (!details.open) return; // closed while it was asked for
    const inside = Map.groupBy(Object.keys(folders), (path) => (above(path) in folders ? above(path) : ""));
    const list = (parent) => element("ul", {}, ...(inside.get(parent) ?? []).map((path) => leaf(path, parent)));
    const leaf = (path, parent) => {
      const name = parent ? path.slice(parent.length + 1) : short(path);
      const made = element("li", {}, button(path, name, folders[path]));
      if (!inside.has(path)) return made;
      const fold = element("button", { type: "button", class: "fold", "aria-label": say("folders_in", { name }), click: () => turn(fold.ariaExpanded !== "true") });
      const turn = (open) => {
        fold.ariaExpanded = String(open);
        open ? made.append(list(path)) : made.querySelector("ul")?.remove();
      };
      made.prepend(fold);
      turn(chosen.startsWith(`${path}/`) || (parent === "" && inside.get("").length === 1));
      return made;
    };
    tree.replaceChildren(button("", none), list(""));
  }

  details.addEventListener("toggle", fill);
  details.addEventListener("keydown", (event) => event.key === "Escape" && details.open && (close(), summary.focus()));
  details.addEventListener("focusout", ({ relatedTarget: next }) => next && !details.contains(next) && close());
  document.addEventListener("pointerdown", (event) => details.contains(event.target) || close());
  show("");
  return show;
}
