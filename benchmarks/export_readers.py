"""Read exports back by their own projects' loaders: OpenRLHF, LLaMA-Factory, Axolotl.

    python benchmarks/export_readers.py --peers /tmp/peers

The result goes to benchmarks/results/export_readers.json, or to --out.

The peers pin other releases of torch, transformers and datasets than this project, so each is
installed without its dependencies into a folder of its own, and its loader runs on the releases
that are here (LLaMA-Factory's own check of them is switched off by its own variable). What each
loader makes of the rows is compared text by text: all prompts, chosen and rejected, in order.

TRL and Argilla are installed with the development packages and read back in tests.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from result_file import RESULTS, cpu, write_result

from feedback.exports import ExportOptions, export
from feedback.records import Message, Preference, prompt_messages
from feedback.shards import ShardWriter, write_json

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "feedback" / "pocket" / "assistant"


class Peer(NamedTuple):
    """A project whose loader reads a form: how to install it, and the form's name."""

    packages: tuple[str, ...]
    form: str


PEERS = {
    "openrlhf": Peer(("openrlhf==0.11.2", "pylatexenc==2.11"), "openrlhf"),
    "llamafactory": Peer(
        ("llamafactory==0.9.5", "omegaconf==2.4.0", "torchaudio==2.11.0"), "llama-factory"
    ),
    "axolotl": Peer(("axolotl==0.19.0", "colorama==0.4.6", "addict==2.4.0"), "axolotl"),
}


class Read(NamedTuple):
    """What a loader made of a row; texts as the chat template renders them, or as messages."""

    prompt: str
    chosen: str
    rejected: str


def sample_rows() -> list[Preference]:
    """Return rows with every feature that a form could lose: system, turns, odd characters."""
    system: Message = {"role": "system", "content": "Be brief: 'yes' or \"no\"."}
    turns: list[Message] = [
        {"role": "user", "content": "Größe? \u4f60\u597d \U0001f600"},
        {"role": "assistant", "content": "Which?\n\n- one\n- two"},
        {"role": "user", "content": "The first {x} %s"},
    ]
    prompts: list[list[Message]] = [
        [{"role": "user", "content": f"Question {number}?"}] for number in range(20)
    ]
    prompts += [turns, [system, *turns], [system, turns[0]]]
    return [
        Preference(
            prompt=prompt,
            chosen=[{"role": "assistant", "content": f"A good answer, {number}.\nEnd"}],
            rejected=[{"role": "assistant", "content": f"No <b>{number}</b>"}],
            margin=0.8,
            p_chosen=0.9,
            prompt_id=f"p{number}",
            source={"judge": "judge"},
        )
        for number, prompt in enumerate(prompts)
    ]


def write_exports(folder: Path, form: str) -> Path:
    """Write the sample rows as shards and export them; return the export's folder."""
    with ShardWriter[Preference](folder / "preferences", "preferences") as writer:
        for row in sample_rows():
            writer.append(row)
        writer.finish({})
    out = folder / form
    export(ExportOptions(preferences=folder / "preferences", out=out, form=form))  # type: ignore[arg-type]
    return out


# --- the projects' own loaders ---------------------------------------------------------------


def read_openrlhf(folder: Path) -> list[Read]:
    """Read by openrlhf.datasets: its blending loader, and RewardDataset with a chat template."""
    from types import SimpleNamespace

    from openrlhf.datasets import RewardDataset
    from openrlhf.datasets.utils import blending_datasets
    from transformers import AutoTokenizer

    columns = SimpleNamespace(
        prompt_key="prompt",
        chosen_key="chosen",
        rejected_key="rejected",
        apply_chat_template=True,
        tokenizer_chat_template=None,
    )
    strategy = SimpleNamespace(
        args=SimpleNamespace(data=columns), print=lambda *_: None, is_rank_0=lambda: True
    )
    data = blending_datasets(str(folder / "preferences.jsonl"), None, strategy)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = RewardDataset(data, tokenizer, 4096, strategy, is_dpo=True, num_processors=1)
    return [
        Read(prompt, chosen, rejected)
        for prompt, chosen, rejected in zip(made.prompts, made.chosens, made.rejects, strict=True)
    ]


def read_llamafactory(folder: Path) -> list[Read]:
    """Read by llamafactory.data: dataset_info.json, ShareGPT converter, pairwise tokenising."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from llamafactory.data.loader import get_dataset
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import AutoTokenizer, Seq2SeqTrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = DataArguments(
        dataset="preferences", dataset_dir=str(folder), template="chatml", cutoff_len=4096
    )
    model = ModelArguments(model_name_or_path=str(MODEL))
    training = Seq2SeqTrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to=[])
    template = get_template_and_fix_tokenizer(tokenizer, data)
    module = get_dataset(template, model, data, training, stage="rm", tokenizer=tokenizer)
    found = []
    for row in module["train_dataset"]:
        texts = []
        for side in ("chosen", "rejected"):
            labels = row[f"{side}_labels"]
            ids = row[f"{side}_input_ids"]
            start = sum(label < 0 for label in labels)
            texts.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])))
        found.append(Read(texts[0][0], texts[0][1], texts[1][1]))
    return found


def read_axolotl(folder: Path) -> list[Read]:
    """Read by axolotl: its DPO strategy by the name and fields in the YAML, rows by `datasets`."""
    import yaml
    from axolotl.prompt_strategies.dpo import load
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.datasets import DPODataset
    from datasets import load_dataset
    from transformers import AutoTokenizer

    config = yaml.safe_load((folder / "preferences.axolotl.yaml").read_text(encoding="utf-8"))
    entry = config["datasets"][0]
    DPODataset.model_validate(entry)
    transform, _ = load(entry["type"], DictDefault(config), dataset_idx=0)
    rows = load_dataset(
        entry["ds_type"], data_files=str(folder / entry["path"]), split=entry["split"]
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = [transform(row, tokenizer=tokenizer) for row in rows]
    return [Read(row["prompt"], row["chosen"], row["rejected"]) for row in made]


READERS: dict[str, Callable[[Path], list[Read]]] = {
    "openrlhf": read_openrlhf,
    "llamafactory": read_llamafactory,
    "axolotl": read_axolotl,
}


# --- comparing -------------------------------------------------------------------------------


def same(row: Preference, read: Read) -> bool:
    """Return whether a loader's row holds every turn of ours, in order, and each answer whole."""
    place = 0
    for turn in prompt_messages(row.prompt):
        found = read.prompt.find(turn["content"], place)
        if found < 0:
            return False
        place = found + len(turn["content"])
    sides = ((row.chosen, read.chosen), (row.rejected, read.rejected))
    return all(
        text.strip().startswith(ours[0]["content"])  # type: ignore[index]
        and other[0]["content"] not in text  # type: ignore[index]
        for (ours, text), (other, _) in zip(sides, sides[::-1], strict=True)
    )


def install(name: str, peers: Path) -> Path:
    """Install a peer without its dependencies; return the folder that goes on the path."""
    folder = peers / name
    if not (folder / ".installed").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(folder), *PEERS[name].packages], check=True)
        # torchaudio's library wants CUDA's; without it its Python part, which is imported but not
        # used for text, loads as it is.
        shutil.rmtree(folder / "torchaudio" / "lib", ignore_errors=True)
        (folder / ".installed").touch()
    return folder


def measure(name: str, peers: Path) -> dict[str, Any]:
    """Install a peer, let it read the export in a process of its own, and compare."""
    path = install(name, peers)
    with tempfile.TemporaryDirectory(prefix="rlaif-exports-") as scratch:
        folder = write_exports(Path(scratch), PEERS[name].form)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--read",
            name,
            "--folder",
            str(folder),
        ]
        result = folder / "read.json"
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        read = [Read(*row) for row in json.loads(result.read_text(encoding="utf-8"))["rows"]]
        version = json.loads(result.read_text(encoding="utf-8"))["version"]
    rows = sample_rows()
    equal = sum(map(same, rows, read)) if len(rows) == len(read) else 0
    return {"reader": name, "version": version, "rows": len(rows), "read": len(read), "same": equal}


def main() -> None:
    """Read one export in a child process, or measure all peers and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=Path, help="folder that gets the peers' packages")
    parser.add_argument("--out", type=Path, default=RESULTS / "export_readers.json")
    parser.add_argument("--read", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        rows = READERS[options.read](options.folder)
        version = importlib.metadata.version(options.read)
        write_json(options.folder / "read.json", {"rows": rows, "version": version})
        return
    if options.peers is None:
        parser.error("--peers is needed")
    runs = [measure(name, options.peers) for name in PEERS]
    figures = {f"same_{run['reader']}": run["same"] / run["rows"] for run in runs}
    write_result(
        options.out,
        "export_readers",
        command="python benchmarks/export_readers.py --peers PEERS",
        hardware=cpu(),
        figures=figures,
        runs=runs,
    )
    print(json.dumps(runs, indent=2))


if __name__ == "__main__":
    main()
