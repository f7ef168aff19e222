"""`python -m lora_nb VERB`: what the notebooks do, without a browser."""

import argparse
import platform
import shutil
import sys

from lora_nb import validate_command
from lora_nb.config import detect_preset, load_config, preset_names, resolve_path
from lora_nb.errors import UserError
from lora_nb.files import from_root, full_disk_is_a_sentence, project_root
from lora_nb.printing import printer, training_printer


def main(argv=None) -> int:
    """Exit code 0, 1 for what the user can mend (one sentence on stderr), 2 for wrong usage, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["validate"]:
        return validate_command.main(argv[1:])
    options = build_parser().parse_args(argv)
    try:
        with full_disk_is_a_sentence(project_root()):
            return options.verb(options) or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to go on.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_nb", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    one = _verb(verbs, "run", run, "the four notebooks, headlessly", settings=True)
    one.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="of a notebook's parameters cell")
    one.add_argument("--only", nargs="+", metavar="NN", help="01, 02, 03 or 04")

    verbs.add_parser("validate", help="find everything that is wrong with a data set (validate --help)", add_help=False)
    _verb(verbs, "encode", encode, "latents and text embeddings to disk (notebook 02)", settings=True)
    one = _verb(verbs, "forecast", forecast, "memory, hours and price of a training, before it begins", settings=True)
    one.add_argument("--gpu", default="", metavar="NAME", help="another GPU than this machine has (RTX4090, T4, ...); --preset auto is then the one for it")
    one.add_argument("--price", type=float, default=0.0, metavar="AN_HOUR", help="what the GPU costs an hour")
    one.add_argument("--measure", action="store_true", help="take some real steps on this machine first (needs notebook 01)")
    _verb(verbs, "train", train, "train, or go on training (notebook 03)", settings=True)

    one = _verb(verbs, "evaluate", evaluate, "which checkpoint, at what strength, and why (notebook 04)")
    one.add_argument("run", help="a run's name or folder")
    one.add_argument("--checkpoints", type=int, default=0, help="how many, evenly spread; 0 takes all (0)")

    one = _verb(verbs, "export", export, "write and prove the files of a checkpoint")
    one.add_argument("run", help="a run's name or folder")
    one.add_argument("--checkpoint", type=int, metavar="N", help="its step; without, the newest, into final/")
    one.add_argument("--format", nargs="+", dest="formats", choices=("kohya", "diffusers", "peft"), help="all three")
    one.add_argument("--dtype", choices=("fp16", "bf16", "fp32"))

    one = _verb(verbs, "inspect", inspect, "what a LoRA file is, whoever made it")
    one.add_argument("file")
    one = _verb(verbs, "replay", replay, "the settings in a LoRA file's header, as a training_config.yaml")
    one.add_argument("file")
    one.add_argument("--to", default="training_config.yaml")

    one = _verb(verbs, "compare", compare, "rank evaluated runs")
    one.add_argument("runs", nargs="+")
    one = _verb(verbs, "sweep", sweep, "a grid of settings, each a run of the four notebooks", settings=True)
    one.add_argument("grid", nargs="+", metavar="SETTING=VALUE,VALUE")

    _verb(verbs, "doctor", doctor, "what this machine has")
    return parser


def _verb(verbs, name, function, help_, settings=False):
    parser = verbs.add_parser(name, help=help_, description=function.__doc__)
    parser.set_defaults(verb=function)
    if settings:
        parser.add_argument("--preset", default="auto", help=f"auto, {', '.join(preset_names())}")
        parser.add_argument("--config", metavar="YAML", help="your settings, over the preset's")
        parser.add_argument("--run-name")
        parser.add_argument("--dataset", metavar="DIR", help="pictures and captions")
        parser.add_argument("--trigger-token")
        parser.add_argument("--max-steps", type=int)
    return parser


def _given(options) -> dict:
    given = {"run_name": options.run_name, "dataset_path": options.dataset, "trigger_token": options.trigger_token, "max_steps": options.max_steps}
    return {name: value for name, value in given.items() if value is not None}


def _config(options):
    return load_config(options.preset, options.config, **_given(options))


def run(options):
    """Run the notebooks with papermill; executed notebooks and pages lie in outputs/RUN/notebooks/."""
    from lora_nb.batch import NOTEBOOKS, run_notebooks
    from lora_nb.results import read_choice

    config, typed = _config(options), dict(options.parameter)
    if options.dataset and "trigger_token" not in config.model_fields_set and "TRIGGER_TOKEN" not in typed:
        raise UserError("--dataset needs --trigger-token: the word in its captions that will call the character.")
    flags = _flags(options.preset, options.config, config, MAX_STEPS=options.max_steps)
    chosen = [name for name in NOTEBOOKS if not options.only or name[:2] in options.only]
    if not chosen:
        raise UserError(f"--only {' '.join(options.only)} names no notebook: take from 01, 02, 03, 04.")
    run_notebooks(config.run_name, typed, chosen, flags=flags, on_event=printer())
    show_results(config.run_dir)
    if choice := read_choice(config.run_dir):
        print(choice["sentence"])


def _flags(preset, config_file, config, **more) -> dict:
    """What notebooks are given. Data set and trigger from the resolved settings: the notebooks' own lie over CONFIG_FILE's."""
    flags = {
        "PRESET": preset, "CONFIG_FILE": _for_notebooks(config_file), "DATASET_PATH": _for_notebooks(config.dataset_path),
        "TRIGGER_TOKEN": config.trigger_token, **more,
    }  # fmt: skip
    return {name: value for name, value in flags.items() if value is not None}


def _for_notebooks(path):
    """The path as notebooks find it too: they work in the project's root, and not where the command was typed."""
    return path if path is None or (project_root() / path).exists() else str(resolve_path(path))


def show_results(run_dir):
    """Where the pictures, the LoRA and the pages are, as far as they are there."""
    places = {
        "pictures": ["evaluation/grids/before_after.png", "evaluation/grids/checkpoints.png"], "LoRA (ComfyUI, A1111, Forge)": [f"final/{run_dir.name}.safetensors"],
        "LoRA (diffusers)": ["final/pytorch_lora_weights.safetensors"], "chosen checkpoint": ["final/*_chosen.safetensors"],
        "notebooks": ["notebooks/0*.html"], "report": ["evaluation/report.html"],
    }  # fmt: skip
    for what, patterns in places.items():
        for path in [path for pattern in patterns for path in sorted(run_dir.glob(pattern))]:
            print(f"{what + ':':30} {from_root(path)}")


def encode(options):
    """Encode the pictures and captions of the run's manifest; what is there already stays."""
    from lora_nb import cache, models
    from lora_nb.manifest import best_manifest, read_manifest

    config = _config(options)
    path = best_manifest(config.run_dir)
    captions = config.captions_beside(sample.caption for sample in read_manifest(path).samples)
    done = cache.encode(
        path, config.base_model, config.vae_model, captions=captions, random_flip=config.random_flip,
        device=models.default_device(), on_event=printer(),
    )  # fmt: skip
    print(f"{done.latents_made} latents and {done.embeddings_made} embeddings made, {done.latents_found + done.embeddings_found} were there; {done.bytes / 2**20:.1f} MiB, {done.seconds:.0f} s")


def forecast(options):
    """What a training will need: peak memory by what holds it, arithmetic, time and price, each with how it is known."""
    from lora_nb.budget import forecast as make_forecast
    from lora_nb.budget import preset_of

    if options.gpu and options.preset == "auto":
        options.preset = preset_of(options.gpu)
        print(f"preset {options.preset}")
    print(make_forecast(_config(options), options.gpu, options.price, options.measure))


def train(options):
    """Train until max_steps and export; a run that has begun goes on. Also under `accelerate launch -m lora_nb train`."""
    from accelerate import PartialState

    from lora_nb.train import train as train_run

    config = _config(options)
    done = train_run(config, on_event=training_printer(config.max_steps))
    if PartialState().is_main_process:
        print(f"{done.status} at step {done.step}; {from_root(done.run_dir)}")
    if done.export:
        print(done.export)
    if done.status != "finished":
        return 130
    return 0 if done.export is None or done.export.ok else 1


def evaluate(options):
    """Draw, measure and choose; grids, scores and the report lie in outputs/RUN/evaluation/."""
    from lora_nb.assess import assess
    from lora_nb.export_run import run_folder

    run_dir = run_folder(options.run)
    print(assess(run_dir, checkpoints=options.checkpoints, on_event=printer()))
    show_results(run_dir)


def export(options):
    """Export a checkpoint and prove each file by reloading it."""
    from lora_nb.export import FORMATS
    from lora_nb.export_run import export_checkpoint

    done = export_checkpoint(options.run, options.checkpoint, formats=options.formats or FORMATS, dtype=options.dtype, on_event=printer())
    print(done)
    return 0 if done.ok else 1


def inspect(options):
    """What this file is, who can load it, rank, alpha, trigger and settings."""
    from lora_nb.inspect_lora import inspect_lora

    print(inspect_lora(options.file))


def replay(options):
    """Write the settings in the header of a LoRA file as a configuration that trains the same again."""
    from lora_nb.replay import write_replay

    print(write_replay(options.file, options.to))


def compare(options):
    """Rank evaluated runs: the settings that differ, scores, cost."""
    from lora_nb.compare import compare as rank
    from lora_nb.compare import comparison_table
    from lora_nb.export_run import run_folder

    print(comparison_table(rank([run_folder(run) for run in options.runs], on_event=printer())))


def sweep(options):
    """Run the notebooks for every combination of settings; run it again to go on after a failure."""
    from lora_nb.batch import run_notebooks
    from lora_nb.compare import compare as rank
    from lora_nb.compare import comparison_table
    from lora_nb.sweep import parse_grid, trials_of
    from lora_nb.sweep import sweep as run_all

    config = _config(options)
    name = options.run_name or f"sweep_{config.run_name}"
    record = project_root() / "outputs" / f"{name}.json"
    trials = trials_of(parse_grid(options.grid), name, options.preset, options.config)

    def run_one(run_name, settings):
        whole = load_config(options.preset, options.config, **(_given(options) | settings | {"run_name": run_name}))
        path = whole.save(whole.run_dir / "settings.yaml")
        run_notebooks(run_name, flags=_flags(options.preset, str(path), whole), on_event=printer())

    done = run_all(trials, record, run_one, on_event=printer())
    for trial in done:
        print(f"{trial.run_name}: {trial.status} {trial.error}")
    if finished := [project_root() / "outputs" / trial.run_name for trial in done if trial.status == "done"]:
        print(comparison_table(rank(finished, on_event=printer())))
    return 0 if all(trial.status == "done" for trial in done) else 1


def doctor(options):
    """Versions, device, memory and disk, and the preset that `auto` would take."""
    import psutil
    import torch

    from lora_nb.metadata import library_versions

    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(", ".join(f"{name} {version}" for name, version in library_versions().items()))
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        print(f"GPU: {card.name}, {card.total_memory / 2**30:.1f} GiB, bf16 {'yes' if torch.cuda.is_bf16_supported(including_emulation=False) else 'no'}")
    else:
        print("GPU: none that PyTorch sees")
    print(f"memory: {psutil.virtual_memory().available / 2**30:.1f} GiB free of {psutil.virtual_memory().total / 2**30:.1f}; cores: {psutil.cpu_count()}")
    print(f"disk: {shutil.disk_usage(project_root()).free / 2**30:.1f} GiB free")
    print(f"preset auto: {detect_preset()}")


if __name__ == "__main__":
    sys.exit(main())
