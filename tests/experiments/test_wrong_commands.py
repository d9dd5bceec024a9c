"""Wrong command lines and YAML files: each ends in one sentence, and nothing is trained or written."""

import itertools
import shlex

import pytest
import yaml
from helpers.models import TRANSFORMER, tiny_backbone, tiny_model
from helpers.pictures import write_images
from helpers.recipes import PROGRAMS, run_script
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from vpns_hf import VPNsTrainer
from vpns_hf.cli import main

SETTINGS = dict(
    model_name_or_path="backbone",
    dataset_name="images",
    output_dir="out",
    prompt_size=4,
    report_to="none",
    use_cpu=True,
    method="vpns",
    disable_tqdm=True,
)
# Flags after `vpns-hf prune`, `compare` and `transfer`, in addition to SETTINGS.
PRUNE = """
--sparsity 1.0 | --sparsity 1.5 | --sparsity -0.1 | --sparsity nan | --sparsity ninety | --sparsity
--sparsit 0.9 | --Sparsity 0.9 | -sparsity 0.9 | --sparsity=1 | sparsity=0.9 | --sparsity 0.9 0.8 | --sparsity ""
--method vpn | --method VPNS | --method "" | --method | --method vpns omp | --method vpns+prompt
--max_steps 0 | --max_steps -2 | --max_steps 1.5 | --max_steps many | --max_steps 1e3
--max_steps 99999999999999999999
--search_epochs -1 | --search_epochs nan | --search_epochs inf | --num_train_epochs -3 | --head_warm_up_epochs -1
--search_max_steps 0 | --total_max_steps 0 | --total_max_steps 1 | --weight_decay -1 | --weight_decay nan
--learning_rate -1 | --learning_rate inf | --learning_rate auto | --score_learning_rate fast | --momentum 1
--score_learning_rate -1 | --score_travel 0 | --score_start hydro | --score_optim adamm | --optim sdg
--score_optim platon
--lr_scheduler_type cosin | --score_lr_scheduler_type cosin | --prompt_mixing sometimes | --eval_prompt no
--metrics top6_accuracy | --metrics | --teacher_weight 2 | --teacher_temperature 0 | --teacher missing
--calibration_images_per_class 0 | --consistency_check_steps -1 | --mixup_alpha -1 | --cutmix_alpha nan
--per_device_train_batch_size 0 | --per_device_train_batch_size 1.5 | --per_device_eval_batch_size 0 | --seed 1.5
--seed -1 | --seed 4294967296 | --seed seven | --data_seed -1 | --gradient_accumulation_steps 0
--logging_steps 0 | --eval_steps -1 | --save_steps 1.5 | --save_total_limit 0 | --eval_strategy never
--save_strategy sometimes | --report_to tensorbord | --use_cpu perhaps | --bf16 2 | --hub_strategy start
--warmup_steps -1
--label_smoothing_factor 1 | --dataloader_num_workers -1 | --auto_find_batch_size true | --label_names a b
--load_best_model_at_end true --eval_strategy no | --fp16 true | --model_name_or_path missing | --model_name_or_path ""
--model_name_or_path images | --model_name_or_path file.txt | --model_name_or_path frozen
--model_name_or_path headless
--model_name_or_path "a b" | --model_revision | --scope rows | --prompt frame | --prompt_size 0 | --prompt_size 17
--prompt_size 1.5 | --prompt_inner_size 64 | --prompt_inner_size 0 | --prompt_inner_size -3 | --label_mapping nearest
--label_mapping frequency --new_head true | --new_head false | --new_head perhaps | --keep_source_head 3
--ignore_modules vit classifier | --image_size 0 | --image_size -32 | --image_size 33333 | --image_size big
--dataset_name missing | --dataset_name file.txt | --dataset_name empty | --dataset_name "" | --dataset_name backbone
--dataset_config_name one | --dataset_revision main | --image_column_name picture | --label_column_name kind
--train_split training | --validation_split dev | --test_split final | --train_split test | --validation_fraction 0
--validation_fraction 1 | --validation_fraction 0.01 | --validation_fraction half | --split_seed -1 | --shots 0
--shots 1.5 | --shots 2 --fraction 0.5 | --fraction 0 | --fraction 2 | --fraction 0.01 | --corrupt_images ignore
--stream_images 0 | --augmentation auto | --preprocessing_num_workers 0 | --preprocessing_num_workers -2
--cache_images maybe | --references vpn | --references | --dry_run later | --license | --config missing.yaml
--config | --config images | --config file.txt | --config= | --unknown 3 | unknown | --no_use_cpu 3 | --help_me
--output_dir file.txt | --output_dir "" | --output_dir file.txt/out | --resume_from_checkpoint missing
--output_dir empty --resume_from_checkpoint out/checkpoint-3
"""
COMPARE = """
--methods vpn | --methods | --methods dense+prompt+prompt | --sparsities 1.0 | --sparsities 0.9 0.9 | --sparsities high
--sparsities | --sparsities 0.9,0.8 | --seeds 1.5 | --seeds -1 | --seeds 7 7 | --seeds | --reference vpn
--only_report true | --only_report maybe | --paper_numbers missing.json | --paper_numbers file.txt
--eval_prompt with | --methods omp tune | --output_dir file.txt
"""
TRANSFER = """
--targets | --targets missing --source x | --targets missing | --methods vpn | --methods tune | --modes fully | --modes
--modes full_other_prompt | --sparsities 1 | --seeds 1.5 | --reference vpn | --subnetwork missing --methods subnetwork
--methods subnetwork | --prompt_subnetwork missing --modes full_other_prompt | --targets images --subnetwork backbone
"""
OTHERS = """
evaluate | evaluate missing --dataset_name images | evaluate frozen | evaluate frozen --dataset_name missing
evaluate frozen --dataset_name images --split tset | evaluate frozen --dataset_name images --batch_size 0
evaluate frozen --dataset_name images --batch_size 1.5 | evaluate frozen --dataset_name images --image_column_name x
evaluate frozen --dataset_name images --label_column_name x | evaluate frozen --dataset_name images --test_split final
evaluate frozen --dataset_name three | evaluate backbone --dataset_name images
evaluate file.txt --dataset_name images
evaluate frozen --dataset_name images --batch_size 99999999999999999999 | evaluate frozen --dataset images
inspect | inspect missing | inspect file.txt | inspect empty | inspect backbone | inspect frozen extra | inspect "a b"
inspect frozen --jsn | export | export frozen | export missing new | export frozen file.txt | export backbone new
export frozen new --format onxx | export frozen a.onnx --format onnx --opset 3
export frozen a.onnx --format onnx --opset 1.5 | export frozen a.onnx --format onnx --opset 999
export frozen empty --format onnx | export frozen new --format timm
export frozen new --with_prompt --without_prompt | export frozen new --opset 18 | push | push frozen
push missing me/x | push empty me/x | push file.txt me/x | push frozen a/b/c | push frozen "a b" | push frozen ""
prun | "" | --unknown | evaluate frozen --dataset_name images --split
"""
YAML = [
    *(
        {name: value}
        for name, values in {
            "seed": [1.5, "seven", None, True, [1], -1, {"a": 1}],
            "sparsity": [1, 1.5, "high", True, [0.9]],
            "max_steps": [0, 1.5, "1.5", None, True],
            "num_train_epochs": [-1, None, "many", ".nan", [3]],
            "method": [False, 3, ["vpns"], None, "vpn"],
            "ignore_modules": ["classifier", 3, [1], {"a": 1}, None],
            "references": ["dense", 3, [3], None, ["dens"]],
            "metrics": ["top5_accuracy", [3]],
            "use_cpu": ["perhaps", 3, None, "2"],
            "learning_rate": [None, "fast", [0.1], -1, True],
            "shots": [1.5, "few", True, 0],
            "prompt": [3, True, ["pad"]],
            "prompt_size": [4.5, "wide", None],
            "eval_strategy": [False, True, 3],
            "report_to": [True, 3],
            "model_name_or_path": [3, None, ["backbone"], ""],
            "dataset_name": [3, None, True],
            "output_dir": [3, True, ["out"]],
            "weight_decay": [-1, "little", None],
            "lr_scheduler_kwargs": [3, [1], "{"],
            "validation_fraction": [0, 1, None],
            "dry_run": [3, None, "maybe"],
            "new_head": [3, "maybe"],
            "cache_images": [3],
            "run_name": [3],
            "sparsty": [0.9],
            "config": ["other.yaml"],
            "SPARSITY": [0.9],
        }.items()
        for value in values
    ),
]
TEXTS = {
    "duplicate": "sparsity: 0.9\nsparsity: 0.5\n",
    "nested duplicate": "lr_scheduler_kwargs: {a: 1, a: 2}\n",
    "sentence": "just a sentence\n",
    "list": "- sparsity\n- 0.9\n",
    "open": "metrics: [\n",
    "number key": "3: 4\n",
    "list key": "[a, b]: 4\n",
    "tab": "a:\n\tb: 1\n",
    "tag": "sparsity: !!python/object/apply:os.system ['touch owned']\n",
    "alias": "a: &a [1]\nmetrics: *a\n",
    "empty": "",
    "null": "~\n",
    "bytes": "sparsity: \xff\xfe",
    "two documents": "sparsity: 0.5\n---\nsparsity: 0.6\n",
    "date": "run_name: 2024-01-01\n",
    "long": "a: 1\n" * 40_000,
}


def command_lines():
    """Yield the words of each wrong command line."""
    for program, block in (("prune", PRUNE), ("compare", COMPARE), ("transfer", TRANSFER)):
        for line in split(block):
            yield [program, *line]
    yield from split(OTHERS)


def split(block):
    return [shlex.split(line) for line in block.replace("\n", " | ").split(" | ") if line.strip()]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder that commands are run in: a backbone, a subnetwork, images, and what is none of these."""
    folder = tmp_path_factory.mktemp("wrong")
    size = {"height": 32, "width": 32}
    tiny_backbone("vit").save_pretrained(folder / "backbone")
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / "backbone")
    ViTModel(ViTConfig(**TRANSFORMER)).save_pretrained(folder / "headless")
    write_images(folder / "images" / "train", 20)
    write_images(folder / "images" / "test", 4)
    write_images(folder / "three", 2, classes=("a", "b", "c"))
    model = tiny_model("vit", num_labels=2)
    model.freeze_masks()
    model.save_pretrained(folder / "frozen")
    (folder / "file.txt").write_text("just a sentence")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def _untrained(folder, monkeypatch):
    def train_stage(*args, **kwargs):
        raise AssertionError("a wrong command came to training")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(VPNsTrainer, "_train_stage", train_stage)


def refused(words, capsys, folder):
    """The program ends with exit code 2 and one sentence on stderr, and leaves no file."""
    before = files(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("vpns-hf")
    assert 20 < len(lines[-1]) < 1100
    assert "Traceback" not in "".join(lines)
    assert files(folder) == before
    return lines[-1]


def given(program, words):
    """The words with the settings that every run needs, unless they have their own."""
    settings = SETTINGS | ({"targets": "images"} if program == "transfer" else {})
    flags = [(f"--{name}", str(value)) for name, value in settings.items() if f"--{name}" not in words]
    return [program, *itertools.chain(*flags), *words]


LINES = list(command_lines())


def test_there_are_many():
    assert len(LINES) + len(YAML) + len(TEXTS) > 250


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_wrong_command_lines_are_refused_in_one_sentence(words, capsys, folder):
    program, *flags = words
    refused(given(program, flags) if program in PROGRAMS.values() else words, capsys, folder)


@pytest.mark.parametrize("content", YAML, ids=str)
def test_wrong_yaml_is_refused_in_one_sentence(content, capsys, folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | content))
    (name,) = content
    line = refused(["prune", "--config", str(path)], capsys, folder)
    assert name in line or "`method` is" in line


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_recipe_are_refused_in_one_sentence(name, capsys, folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(TEXTS[name].encode("latin-1"))
    refused(["prune", "--config", str(path)], capsys, folder)


def test_recipes_and_the_command_refuse_alike(capsys, folder):
    flags = given("prune", ["--sparsity", "1.0"])[1:]
    sentence = refused(["prune", *flags], capsys, folder).removeprefix("vpns-hf prune: ")
    with pytest.raises(SystemExit, match="2"):
        run_script("prune_vit.py", flags)
    assert capsys.readouterr().err.splitlines()[-1] == f"prune_vit.py: {sentence}"
