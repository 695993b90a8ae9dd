// Runs minilora in Pyodide: a request is answered by events. Between two events others are heard, so that
// a training can be stopped, or another matrix looked at.
const LONG = ["train", "find"];  // of these a new one ends the one before
let python, lab, turn = 0, mounted = "";

self.onmessage = async ({data}) => {
  try {
    if (data.do === "start") await start(data);
    else if (data.do === "stop") turn++;
    else await answer(data);
  } catch (error) {
    self.postMessage({event: "failed", do: data.do, says: String(error.message ?? error)});
  }
};

async function start({pyodide, archive}) {
  const fetched = fetch(archive).then(response => response.arrayBuffer());
  const {loadPyodide} = await import(`${pyodide}pyodide.mjs`);
  python = await loadPyodide({indexURL: pyodide});
  await python.loadPackage("numpy", {messageCallback() {}});
  python.unpackArchive(await fetched, "zip", {extractDir: "/lab"});
  lab = python.runPython("import sys; sys.path.insert(0, '/lab'); from minilora.lab.lab import Lab; Lab()");
  await answer({do: "greet"});
}

async function answer({files, ...request}) {
  const long = LONG.includes(request.do), mine = long ? ++turn : turn;
  const folder = files && await unreadable(files);
  if (folder) {
    self.postMessage({event: "refused", do: request.do, says: `${folder}: cannot be read; drop the files in the folder, not the folder`});
    return;
  }
  if (files) request.path = mount(files);
  const events = lab.answer(JSON.stringify(request));
  for (const event of events) {
    self.postMessage(JSON.parse(event));
    if (long) {
      await new Promise(resolve => setTimeout(resolve));
      if (turn !== mine) break;
    }
  }
  events.destroy();
  self.postMessage({event: "over", do: request.do, stopped: turn !== mine});
}

async function unreadable(files) {  // the name of the first that is none, such as a folder; Python would end with it
  for (const file of files) {
    try {
      await file.slice(0, 1).arrayBuffer();
    } catch {
      return file.name;
    }
  }
}

function mount(files) {  // they are read where they lie, and not copied
  if (mounted) python.FS.unmount(mounted);
  mounted = "/given";
  python.FS.mkdirTree(mounted);
  python.FS.mount(python.FS.filesystems.WORKERFS, {files}, mounted);
  return files.length === 1 ? `${mounted}/${files[0].name}` : mounted;
}
