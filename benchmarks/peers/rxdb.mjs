// RxDB in one of three roles: `server`, `one` (commits) or `other` (observes). Its memory storage
// and its own websocket replication: nothing is kept when a process ends.

import { createRxDatabase } from "rxdb/plugins/core";
import {
  replicateWithWebsocketServer,
  startWebsocketServer,
} from "rxdb/plugins/replication-websocket";
import { getRxStorageMemory } from "rxdb/plugins/storage-memory";
import { commits, now, say } from "./lines.mjs";

const [role, , url] = process.argv.slice(2);

const schema = {
  version: 0,
  primaryKey: "id",
  type: "object",
  properties: {
    id: { type: "string", maxLength: 64 },
    title: { type: "string" },
    done: { type: "boolean" },
    n: { type: "number" },
    tags: { type: "array", items: { type: "string" } },
    body: { type: "string" },
  },
  required: ["id"],
};

const database = await createRxDatabase({
  name: role,
  storage: getRxStorageMemory(),
  multiInstance: false, // no other instance in this process: nothing to tell, which is quicker
});
const { notes } = await database.addCollections({ notes: { schema } });

if (role === "server") {
  const { server } = startWebsocketServer({ database, host: "127.0.0.1", port: 0 });
  server.once("listening", () => say({ url: `ws://127.0.0.1:${server.address().port}` }));
} else {
  if (role === "other") {
    notes.insert$.subscribe((event) => {
      const at = now();
      say({ id: event.documentId, at });
    });
  }
  const replication = await replicateWithWebsocketServer({
    replicationIdentifier: "peers",
    collection: notes,
    url,
    live: true,
  });
  replication.error$.subscribe((error) => {
    console.error(error);
    process.exit(1);
  });
  await replication.awaitInitialReplication();
  say({ ready: true });
  if (role === "one") commits((id, value) => notes.insert({ id, ...value }));
}
