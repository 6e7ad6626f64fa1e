// The index in the browser's own storage: a record a picture, with its vector and its thumbnail.
const [DATABASE, PICTURES] = ["capivara", "pictures"];
const opened = new Promise((done, fail) => {
  const request = indexedDB.open(DATABASE, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(PICTURES, { keyPath: "key" });
  request.onsuccess = () => done(request.result);
  request.onerror = () => fail(Object.assign(request.error, { code: "no_storage" }));
});
opened.catch(() => {}); // it is said where it is asked for

async function ask(mode, call) {
  const transaction = (await opened).transaction(PICTURES, mode);
  return new Promise((done, fail) => {
    const request = call(transaction.objectStore(PICTURES));
    transaction.oncomplete = () => done(request.result);
    transaction.onabort = transaction.onerror = () => fail(Object.assign(transaction.error ?? new Error(), { code: "no_room" }));
  });
}

/** What a picture is known by: the model's image side, and the file's place, size and time. */
export const key = (digest, file) => [digest, file.webkitRelativePath || file.name, file.size, file.lastModified].join("|");

/** All records that the model of this digest has made. */
export const all = (digest) => ask("readonly", (store) => store.getAll(IDBKeyRange.bound(`${digest}|`, `${digest}|\uffff`)));
export const put = (picture) => ask("readwrite", (store) => store.put(picture));
export const remove = (key) => ask("readwrite", (store) => store.delete(key));
/** Forgets the pictures of every model. */
export const clear = () => ask("readwrite", (store) => store.clear());
