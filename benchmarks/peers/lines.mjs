// How a peer's process speaks with the driver: one JSON object a line, both ways.

import { createInterface } from "node:readline";

// Nanoseconds of the system's monotonic clock, the same in every process.
export const now = () => Number(process.hrtime.bigint());

export const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);

const input = createInterface({ input: process.stdin });

// Who started this process is gone.
input.on("close", () => process.exit(0));

// For each line `{"id": …, "value": …}` commits it and says when that began, once it is over.
export function commits(commit) {
  input.on("line", async (line) => {
    const { id, value } = JSON.parse(line);
    const at = now();
    await commit(id, value);
    say({ id, at });
  });
}
