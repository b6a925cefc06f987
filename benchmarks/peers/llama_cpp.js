// llama.cpp through node-llama-cpp: one context, a sequence for each stream. Speaks the protocol of worker.py.
//
// A warmed run keeps what a sequence has in common with the new prompt, which is its persona's prompt; a cold one clears
// it. Batches are formed by node-llama-cpp's own dispatcher, as its chat sessions do.

import {createInterface} from "node:readline";

const settings = JSON.parse(process.argv[2]);
const {engine} = settings;
const answer = (message) => process.stdout.write(JSON.stringify(message) + "\n");

let library;
try {
    library = await import("node-llama-cpp");
} catch (error) {
    answer({absent: `node-llama-cpp is not installed (${error.code}); npm install --prefix benchmarks/peers`});
    process.exit(0);
}

const llama = await library.getLlama({
    gpu: false,
    build: "never",
    maxThreads: engine.threads,
    logger: (level, message) => process.stderr.write(`${level} ${message}\n`),
});
const model = await llama.loadModel({modelPath: settings.gguf});
const context = await model.createContext({
    sequences: settings.streams,
    contextSize: settings.context_size,
    batchSize: engine.batch_size,
    flashAttention: engine.flash_attention,
    threads: engine.threads,
});
const sequences = Array.from({length: settings.streams}, () => context.getSequence());
answer({ready: true});

for await (const line of createInterface({input: process.stdin})) {
    answer(await run(JSON.parse(line)));
}
process.exit(0);

async function run(asked) {
    const started = performance.now();
    const replies = await Promise.all(
        asked.prompts.map((prompt, place) => reply(asked, prompt, sequences[asked.personas[place]], place)),
    );
    const seconds = (performance.now() - started) / 1000;
    return {
        seconds,
        moments: replies.map(({moments}) => moments.map((moment) => (moment - started) / 1000)),
        num_prompt_tokens: asked.prompts.reduce((sum, prompt) => sum + prompt.length, 0),
        num_cached_tokens: replies.reduce((sum, {numCached}) => sum + numCached, 0),
    };
}

async function reply(asked, prompt, sequence, place) {
    if (asked.warmed) await sequence.adaptStateToTokens(prompt.slice(0, -1), false);
    else await sequence.clearHistory();
    const numCached = sequence.nextTokenIndex;
    const sampling = {temperature: asked.temperature, topP: asked.top_p, topK: 0, minP: 0, seed: asked.seed + place};
    const moments = [];
    const tokens = sequence.evaluate(prompt.slice(numCached), {...sampling, yieldEogToken: true});
    for await (const _ of tokens) {
        moments.push(performance.now());
        if (moments.length === asked.num_tokens) break;
    }
    if (moments.length !== asked.num_tokens) throw new Error(`${moments.length} of ${asked.num_tokens} tokens came`);
    return {moments, numCached};
}
