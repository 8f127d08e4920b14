"""One file a command, and the table of them."""

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("lightning_peft.commands.demo:demo", "fine-tune a small real model and score it, nothing else needed"),
    "train": ("lightning_peft.commands.train:train", "fine-tune a model; -m sweeps over comma-separated values"),
    "submit": (
        "lightning_peft.commands.submit:submit",
        "hand a training to SLURM, Kubernetes or SkyPilot: cluster.partition=... cluster.nodes=2",
    ),
    "data": ("lightning_peft.commands.data:data", "what train would be given: samples, audit, lengths; no model"),
    "models": ("lightning_peft.commands.models:models", "what was verified of each family of models, or of MODEL"),
    "estimate": ("lightning_peft.commands.estimate:estimate", "memory and work that train would need; no weights read"),
    "sweep": ("lightning_peft.commands.sweep:sweep", "status, retry, cancel or table of a sweep"),
    "evaluate": ("lightning_peft.commands.evaluate:evaluate", "score base and adapter on held-out rows"),
    "generate": ("lightning_peft.commands.generate:generate", "answer a prompt, a file of prompts, or chat"),
    "pairs": ("lightning_peft.commands.pairs:pairs", "an adapter's own wrong answers beside right ones, for dpo"),
    "calibrate": (
        "lightning_peft.commands.calibrate:calibrate",
        "how far an adapter's probabilities can be believed: ECE, Brier, entropy",
    ),
    "inspect": ("lightning_peft.commands.inspect:inspect", "what an adapter has learned: sizes, ranks, directions"),
    "convert": (
        "lightning_peft.commands.convert:convert",
        "cut an adapter to a rank, make several one, LoRA to DoRA and back",
    ),
    "merge": ("lightning_peft.commands.merge:merge", "write base and adapter as one plain model, with a receipt"),
    "report": ("lightning_peft.commands.report:report", "one HTML page of a run or sweep: curves, table, samples"),
    "push": ("lightning_peft.commands.push:push", "upload an adapter or merged model to the hub, with its card"),
    "export": ("lightning_peft.commands.export:export", "write an adapter as vLLM, llama.cpp or Ollama read it"),
    "serve": ("lightning_peft.commands.serve:serve", "one base and many adapters behind OpenAI's endpoints"),
    "init": ("lightning_peft.commands.init:init", "write a YAML file of your own to start from"),
    "config": ("lightning_peft.commands.show_config:show_config", "the composed config of train WORDS, with origins"),
    "schema": ("lightning_peft.commands.schema:schema", "a JSON schema of such a file, for editors"),
    "completion": ("lightning_peft.commands.completion:completion", "completion for bash, zsh or fish"),
    "d90": (
        "lightning_peft.commands.d90:d90",
        "how few trained numbers a task takes, from a sweep of method=intrinsic",
    ),
}
"""Name -> the place of its function, and a line that says what it does."""
