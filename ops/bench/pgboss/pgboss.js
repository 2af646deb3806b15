// pg-boss as it comes, given jobs one a call. A program of the bench: what it says and hears is as in ops/bench/stage.py.
//
// Told: directory, database, submitters, workers, jobs. Each worker is a loop of its calls `fetch` and `complete`, for
// its own `work` sleeps half a second at least after every job. Who finds nothing asks again when a job came in.

import { createInterface } from "node:readline";
import PgBoss from "pg-boss";

const QUEUE = "bench";
const WARM_UP_JOBS = 200;

const { directory, database, submitters, workers, jobs } = JSON.parse(process.argv[2]);
const connections = Math.min(submitters + workers, 64);
const boss = new PgBoss({ host: directory, port: 5432, database, user: "muniment", max: connections });
boss.on("error", (error) => {
  throw error;
});
await boss.start();
await boss.createQueue(QUEUE);

let toSend = 0;
let toComplete = 0;
let idle = [];
const seen = new Set();

async function submit() {
  while (toSend-- > 0) {
    await boss.send(QUEUE, { number: toSend });
    idle.shift()?.();
  }
}

async function work() {
  while (toComplete > 0) {
    const [job] = await boss.fetch(QUEUE, { batchSize: 1 });
    if (job === undefined) {
      if (toComplete > 0) await new Promise((resolve) => idle.push(resolve));
      continue;
    }
    if (seen.has(job.id)) throw new Error(`${job.id} was handed out twice`);
    seen.add(job.id);
    await boss.complete(QUEUE, job.id);
    if (--toComplete === 0) idle.forEach((wake) => wake());
  }
}

async function workOff(count) {
  toSend = toComplete = count;
  idle = [];
  const all = [];
  for (let number = 0; number < submitters; number++) all.push(submit());
  for (let number = 0; number < workers; number++) all.push(work());
  await Promise.all(all);
}

await workOff(Math.min(WARM_UP_JOBS, jobs));
const input = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
console.log("ready");
if ((await input.next()).value !== "go") process.exit(1);
const begun = performance.now();
const cpu = process.cpuUsage();
await workOff(jobs);
const seconds = (performance.now() - begun) / 1000;
const { user, system } = process.cpuUsage(cpu);
console.log(JSON.stringify({ count: jobs, seconds, cpu_seconds: (user + system) / 1e6 }));
process.exit(0);
