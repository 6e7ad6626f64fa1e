// gradio says some things in English whatever the page's language. Loaded as a script of the page's head.
document.documentElement.lang = "pt-BR"; // for screen readers
const SAID = [
  [/^Error\s*$/, "Erro "],
  [/^File\(s\) exceed/, "O arquivo é grande demais: o limite é de {limit} MB."],
  [/^Invalid file type/, "Este arquivo não é uma imagem."],
  [/^Connection errored out|[Cc]onnection (to the server )?(was )?lost/, "A conexão caiu. Recarregue a página."],
];
new MutationObserver(() => {
  for (const said of document.querySelectorAll(".toast-title, .toast-message-text")) {
    const text = said.firstChild;
    const known = text && SAID.find(([english]) => english.test(text.nodeValue || ""));
    if (known) text.nodeValue = known[1];
  }
}).observe(document.documentElement, { childList: true, subtree: true });
