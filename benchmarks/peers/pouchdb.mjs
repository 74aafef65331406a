// PouchDB in one of three roles: `server`, `one` (commits) or `other` (observes). LevelDB in a
// directory on both sides, which it writes without asking for a flush.

import express from "express";
import expressPouchDB from "express-pouchdb";
import PouchDB from "pouchdb";
import { commits, now, say } from "./lines.mjs";

const [role, directory, url] = process.argv.slice(2);
const Local = PouchDB.defaults({ prefix: `${directory}/` });

if (role === "server") {
  const app = express();
  app.use("/", expressPouchDB(Local, { mode: "minimumForPouchDB", inMemoryConfig: true }));
  const server = app.listen(0, "127.0.0.1", async () => {
    await new Local("notes").info();
    say({ url: `http://127.0.0.1:${server.address().port}/notes` });
  });
} else {
  const notes = new Local("notes");
  await notes.info();
  if (role === "other") {
    notes.changes({ live: true, since: "now" }).on("change", (change) => {
      const at = now();
      say({ id: change.id, at });
    });
  }
  // As its manual has it for live replication; both ways, as every device has them.
  const replication = notes.sync(url, { live: true, retry: true });
  replication.on("error", (error) => {
    console.error(error);
    process.exit(1);
  });
  replication.once("paused", () => say({ ready: true }));
  if (role === "one") commits((id, value) => notes.put({ _id: id, ...value }));
}
