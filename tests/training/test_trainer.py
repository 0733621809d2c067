"""The Trainer's seams, used from a notebook."""

import gc
import inspect
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import register_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import TensorDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import m2f_trainer
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import Category, categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.transforms import EvalTransform, TrainTransform
from m2f_trainer.errors import CheckpointError, RecipeError, SharingError
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.hub.upload import push
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.run_folder import EVALUATION
from m2f_trainer.training.prepare import eval_samples
from m2f_trainer.training.trainer import EMPTY_EPOCH, M2FTrainer, has_dense_images
from tests.hub.loopback import hub_of_this_process
from tests.model.tiny import images, tiny_model
from tests.training.runs import write_dense


def trainer_of(folder: Path, **fields: Any) -> M2FTrainer:
    """A trainer as a notebook makes it."""
    rest = {"use_cpu": True, "report_to": "none", "dataloader_num_workers": 0}
    arguments = TrainArguments(output_dir=str(folder), **rest, **fields)
    return M2FTrainer(tiny_model(), arguments, eval_dataset=TensorDataset(torch.zeros(1)))


def test_a_model_saved_by_hand_has_no_pickle_beside_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        trainer.save_model(None if folder == tmp_path else str(folder))
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        load_model(str(folder))


def test_the_trainers_own_upload_is_refused_with_the_command_to_use_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs.txt").write_text("stays here")
    with hub_of_this_process(monkeypatch) as hub:
        for strategy in ("end", "every_save"):
            with pytest.raises(RecipeError, match=r"would upload all of .* run m2f push .* NAME/MODEL"):
                trainer_of(tmp_path, push_to_hub=True, hub_model_id="me/pets", hub_strategy=strategy)
        trainer = trainer_of(tmp_path)
        with pytest.raises(SharingError, match=r"would upload all of .* run m2f push .* NAME/MODEL"):
            trainer.push_to_hub()
        trainer.save_model()
        assert not hub.requests
        push(str(tmp_path), "me/pets")
    code = {name for name in hub.files if name.endswith(".py")}
    legal = {"LICENSE", "NOTICE", "DINOV3_LICENSE.md"}
    assert set(hub.files) - code == {"README.md", "config.json", "model.safetensors"} | legal
    assert not any(b"stays here" in body for body in hub.bodies)


@pytest.mark.filterwarnings("default")  # torch's compiler warns at its own code
def test_compiled_training_is_not_compiled_again_for_other_numbers_of_objects(tmp_path: Path) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    register_backend(graphs, name="counted")
    trainer = trainer_of(tmp_path, torch_compile=True, torch_compile_backend="counted")
    model = trainer.model.train()
    compiled = []
    for step in range(50):
        counts = step * 7 % 61, step * 13 % 61
        model(**scene_of(counts)).loss.backward()
        compiled.append(graphs.frame_count)
    assert compiled[0] >= 1
    assert compiled[-1] == compiled[0]
    assert all(one.grad is not None for one in model.model.parameters() if one.requires_grad)


def scene_of(counts: Sequence[int]) -> dict[str, Any]:
    """A batch of noise with the given number of square objects in each image."""
    objects = [torch.zeros(count, 64, 64) for count in counts]
    for masks in objects:
        for k, mask in enumerate(masks):
            mask[k % 50 : k % 50 + 9, k // 2 : k // 2 + 9] = 1
    classes = [torch.arange(count) % 2 for count in counts]
    return {"pixel_values": images(len(counts)), "mask_labels": objects, "class_labels": classes}


EMPTY = inspect.Parameter.empty
PRIVATE: dict[str, dict[str, object]] = {
    "_save": {"self": EMPTY, "output_dir": None, "state_dict": None},
    "_save_checkpoint": {"self": EMPTY, "model": EMPTY, "trial": EMPTY},
    "_get_dataloader": {
        "self": EMPTY, "dataset": EMPTY, "description": EMPTY, "batch_size": EMPTY, "sampler_fn": None,
        "is_training": False, "dataloader_key": None,
    },
    "_get_num_items_in_batch": {"self": EMPTY, "batch_samples": EMPTY, "device": EMPTY},
    "_get_grad_norm": {"self": EMPTY, "model": EMPTY, "grad_norm": None},
    "_load_best_model": {"self": EMPTY},
    "_load_callback_state": {"self": EMPTY},
    "_load_optimizer_and_scheduler": {"self": EMPTY, "checkpoint": EMPTY},
}  # fmt: skip


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_method_that_is_overridden_has_the_signature_we_know(name: str) -> None:
    parameters = inspect.signature(getattr(Trainer, name)).parameters.values()
    assert {one.name: one.default for one in parameters} == PRIVATE[name]
    assert name in vars(M2FTrainer)


def test_no_other_private_method_of_the_trainer_is_overridden() -> None:
    inherited = {name for name in vars(M2FTrainer) if name in vars(Trainer) and not name.startswith("__")}
    assert {name for name in inherited if name.startswith("_")} == set(PRIVATE)


def test_the_trainer_keeps_the_loss_since_the_last_log_where_the_guard_reads_it() -> None:
    assert "self._tr_loss = torch.tensor(0.0" in inspect.getsource(Trainer._inner_training_loop)
    assert "self._tr_loss +=" in inspect.getsource(Trainer._run_epoch)


def test_a_trainer_makes_our_parameter_groups_and_the_recipes_schedule(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, warmup_steps=0, lr_scheduler_type="constant_with_warmup", lr_milestones=[0.5])
    trainer.create_optimizer_and_scheduler(10)
    groups = trainer.optimizer.param_groups
    assert [group["name"] for group in groups] == ["neck and head"] * 2 + ["backbone"] * 2
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 1e-5, 1e-6, 1e-6])
    trainer.lr_scheduler = None  # as the Trainer does before it trains again, with a smaller batch
    trainer.create_scheduler(10)
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
    assert trainer._created_lr_scheduler, "the Trainer replaces only a schedule that it has made itself"


def test_a_trainer_takes_a_schedules_steps_as_fractions_of_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, warmup_steps=10, lr_scheduler_type="warmup_stable_decay")
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [rates[step] for step in (5, 10, 80, 85)] == pytest.approx([5e-5, 1e-4, 1e-4, 5e-5]), (
        "80 to 100 is the fifth"
    )
    assert trainer.args.lr_scheduler_kwargs == {"num_decay_steps": 0.2, "decay_type": "1-sqrt"}, (
        "as saved in the recipe"
    )


def test_the_last_batch_is_dropped_in_training_and_never_in_evaluation(tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    trainer, three = trainer_of(tmp_path, dataloader_drop_last=True, **sizes), TensorDataset(torch.zeros(3))
    trainer.train_dataset = three
    loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader(three), trainer.get_test_dataloader(three)
    assert [len(loader) for loader in loaders] == [1, 2, 2]


def test_only_the_main_process_builds_the_evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes time and memory in proportion to the split; the other processes only wait for its figures."""
    built: list[object] = []
    monkeypatch.setattr("m2f_trainer.training.trainer.Evaluator", built.append)
    monkeypatch.setattr("m2f_trainer.training.trainer.from_main", lambda _: {"map": 0.5})
    rows = load_coco(write_sample(tmp_path / "data", images=(2, 1, 0)))["valid"]
    trainer = trainer_of(tmp_path)
    figures = trainer.evaluate(InstanceDataset(rows, EvalTransform(64, 64), categories_of(rows)))
    assert figures["eval_map"] == 0.5
    assert not built


@pytest.mark.parametrize("tile_size", [None, 32])
def test_a_dense_split_is_scored_on_all_predictions_too(tmp_path: Path, tile_size: int | None) -> None:
    """The last validation image has 121 objects, and the model as many predictions of an image, or of each tile."""
    rows = load_coco(write_dense(tmp_path))["valid"]
    model = tiny_model(num_queries=121, tile_size=tile_size, categories=[vars(one) for one in categories_of(rows)])
    samples = eval_samples(rows, model.config, categories_of(rows))
    arguments = TrainArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    arguments.dataloader_num_workers, arguments.dataloader_persistent_workers = 0, False
    trainer = M2FTrainer(model, arguments, eval_dataset=samples)
    assert "eval_unlimited_map" in trainer.evaluate()
    assert sum(row["objects"] for row in trainer.details["classes"]) > 121
    assert len(trainer.predictions[-1]) > 100 or tile_size
    assert trainer.merger is None or trainer.merger.limit is None
    given = M2FTrainer(model, arguments, eval_dataset=samples, compute_metrics=Evaluator(rows))
    given.evaluate()
    assert len(given.predictions[-1]) == len(trainer.predictions[-1])
    own = M2FTrainer(model, arguments, eval_dataset=samples, compute_metrics=lambda found: {"most": len(found[-1])})
    assert own.evaluate()["eval_most"] <= 100
    assert own.merger is None or own.merger.limit == 100


def test_dense_images_are_counted_whatever_the_classes_of_the_model(tmp_path: Path) -> None:
    """A split may have classes that a model lacks."""
    rows = load_coco(write_dense(tmp_path))["valid"]
    fewer = categories_of(rows)[1:]
    assert has_dense_images(InstanceDataset(rows, EvalTransform(64, 64), fewer))
    assert not has_dense_images(InstanceDataset(rows.select([0]), EvalTransform(64, 64), fewer))


def test_each_class_of_the_model_has_its_own_threshold_whatever_classes_were_scored(tmp_path: Path) -> None:
    """The model has the classes in another order than the split, and one more."""
    rows = load_coco(write_sample(tmp_path / "data", images=(1, 2, 0)))["valid"]
    first, *rest = categories_of(rows)
    categories = [*reversed(rest), Category(99, "owl"), first]
    trainer = M2FTrainer(
        tiny_model(categories=[vars(one) for one in categories]),
        TrainArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", dataloader_num_workers=0),
        eval_dataset=InstanceDataset(rows, EvalTransform(64, 64), categories),
    )
    trainer.evaluate()
    assert set(Predictor(trainer.model).thresholds()) == {one.id for one in categories}
    found = [{**row, "threshold": 0.9, "kept": int(row["id"] == first.id)} for row in trainer.details["classes"]]
    trainer.store_thresholds({"classes": found})
    trainer.save_model()
    expected = {**dict.fromkeys([one.id for one in categories], 0.5), first.id: 0.8999}
    assert Predictor.from_pretrained(str(tmp_path / "run")).thresholds() == expected


class SureOfFirst(TrainerCallback):
    """Writes an evaluation into the first checkpoint, in which every class is best above 0.9."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            path = Path(str(args.output_dir), "checkpoint-1", EVALUATION)
            details = json.loads(path.read_text())
            rows = [{**row, "threshold": 0.9, "kept": 1} for row in details["classes"]]
            path.write_text(json.dumps({**details, "classes": rows}))


def test_the_best_model_has_the_thresholds_of_its_own_evaluation(tmp_path: Path) -> None:
    """Not those of the last step, nor of another dataset that is scored later."""
    data = load_coco(write_sample(tmp_path / "data", images=(4, 2, 2)))
    categories = categories_of(data["train"])
    valid, test = (InstanceDataset(data[split], EvalTransform(64, 64), categories) for split in ("valid", "test"))
    trainer = M2FTrainer(
        tiny_model(categories=[vars(one) for one in categories]),
        TrainArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, checkpointing_steps="1", use_cpu=True, report_to="none",
            dataloader_num_workers=0,
        ),
        train_dataset=InstanceDataset(data["train"], TrainTransform(64, 64), categories),
        eval_dataset=valid,
        callbacks=[SureOfFirst()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 1, "both have an AP of 0"
    trainer.evaluate(test)
    trainer.save_model()
    assert set(Predictor.from_pretrained(str(tmp_path / "run")).thresholds().values()) == {0.8999}


def test_a_notebook_trains_evaluates_and_predicts_with_the_public_names(tmp_path: Path) -> None:
    """As README's example, with a tiny random model."""
    data = m2f_trainer.load_coco(write_sample(tmp_path / "data", images=(4, 2, 0)))
    categories = m2f_trainer.categories_of(data["train"])
    model = tiny_model(categories=categories)
    trainer = m2f_trainer.M2FTrainer(
        model,
        m2f_trainer.TrainArguments(output_dir=str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to="none"),
        train_dataset=m2f_trainer.InstanceDataset(data["train"], m2f_trainer.TrainTransform(64, 64), categories),
        eval_dataset=m2f_trainer.InstanceDataset(data["valid"], m2f_trainer.EvalTransform(64, 64), categories),
    )
    trainer.train()
    found = trainer.predict(trainer.eval_dataset).predictions
    assert [one.image_id for one in found] == data["valid"]["image_id"]
    assert trainer.evaluate()["eval_map"] == m2f_trainer.CocoMap(data["valid"])(found)["map"]
    predictor = m2f_trainer.Predictor(model)
    photos = [str(row["image"]["path"]) for row in data["valid"]]
    again = predictor(photos, threshold=0.0, image_ids=data["valid"]["image_id"])
    scores = [m2f_trainer.CocoMap(data["valid"])(one)["mar_100"] for one in (found, again)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def children() -> set[int | None]:
    """The processes that this one has started and that run."""
    gc.collect()
    return {one.pid for one in multiprocessing.active_children()}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_is_given_is_the_one_that_is_evaluated(tmp_path: Path, workers: int) -> None:
    """transformers keeps the loader of a dataset whose workers persist."""
    splits = load_coco(write_sample(tmp_path / "data", images=(3, 2, 0)))
    train, valid = (InstanceDataset(rows, EvalTransform(64, 64), categories_of(rows)) for rows in splits.values())
    arguments = TrainArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", dataloader_num_workers=workers)
    before, own = children(), {"eval_dataset": valid, "compute_metrics": lambda found: {"images": len(found)}}
    trainer = M2FTrainer(tiny_model(categories=[vars(one) for one in train.categories]), arguments, **own)
    assert trainer.evaluate()["eval_images"] == 2
    assert trainer.evaluate(train)["eval_images"] == 3
    assert [one.image_id for one in trainer.predictions] == splits["train"]["image_id"]
    assert trainer.evaluate()["eval_images"] == 2
    both = trainer.evaluate({"train": train, "valid": valid})
    assert (both["eval_train_images"], both["eval_valid_images"]) == (3, 2)
    assert len(children() - before) == workers, "only those of the validation samples are kept"


def notebook(folder: Path, callbacks: Sequence[TrainerCallback] = (), **fields: Any) -> M2FTrainer:
    """A trainer with a training and a validation split, as a notebook makes it."""
    data = load_coco(write_sample(folder / "data", images=(4, 1, 0)))
    categories = categories_of(data["train"])
    rest = {"use_cpu": True, "report_to": "none", "dataloader_num_workers": 0, "lr_scheduler_type": "constant"}
    return M2FTrainer(
        tiny_model(categories=[vars(one) for one in categories]),
        TrainArguments(output_dir=str(folder / "run"), per_device_train_batch_size=2, **rest, **fields),
        train_dataset=InstanceDataset(data["train"], TrainTransform(64, 64), categories),
        eval_dataset=InstanceDataset(data["valid"], EvalTransform(64, 64), categories),
        callbacks=callbacks,
    )


def test_early_stopping_works_in_a_notebook(tmp_path: Path) -> None:
    trainer = notebook(tmp_path, max_steps=8, checkpointing_steps=1, early_stopping_patience=1, learning_rate=0.0)
    trainer.train()
    assert trainer.state.global_step == 2, "the second figure equals the first"


def test_early_stopping_that_a_notebook_gives_is_the_only_one(tmp_path: Path) -> None:
    own = EarlyStoppingCallback(3)
    trainer = notebook(tmp_path, [own], max_steps=2, early_stopping_patience=1)
    assert [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)] == [own]


def test_an_optimizer_with_other_groups_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Earlier versions decayed other parameters."""
    trainer = notebook(tmp_path, max_steps=1, checkpointing_steps=1)
    trainer.train()
    file = tmp_path / "run" / "checkpoint-1" / "optimizer.pt"
    state = torch.load(file)
    state["param_groups"][0]["params"].pop()
    torch.save(state, file)
    message = r"checkpoint-1: its optimizer has other groups of parameters .* --init_from .*checkpoint-1"
    with pytest.raises(CheckpointError, match=message):
        notebook(tmp_path, max_steps=2, checkpointing_steps=1).train(str(file.parent))


def test_minutes_work_in_a_notebook_and_count_from_each_call(tmp_path: Path) -> None:
    trainer = notebook(tmp_path, max_minutes=0.01, checkpointing_steps=10**6)
    for _ in range(2):
        begun = time.monotonic()
        trainer.train()
        assert 0.6 <= time.monotonic() - begun < 30
        assert trainer.state.global_step >= 1
        assert "eval_map" in trainer.latest_metrics


def test_a_run_may_resume_automatically(tmp_path: Path) -> None:
    """As recipes/slurm.sh asks for it."""
    assert notebook(tmp_path, resume_from_checkpoint="auto", max_steps=1).args.max_steps == 1


def test_a_number_of_a_notebook_may_not_be_auto(tmp_path: Path) -> None:
    arguments = TrainArguments(str(tmp_path), learning_rate="auto", num_train_epochs="auto", report_to="none")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="num_train_epochs, learning_rate: expected a number, got auto, which only"):
        M2FTrainer(tiny_model(), arguments)


def test_the_warning_that_is_hidden_at_the_end_of_a_resumed_run_is_there() -> None:
    assert EMPTY_EPOCH in inspect.getsource(Trainer._run_epoch)


def test_arguments_of_a_notebook_that_can_not_work_are_named(tmp_path: Path) -> None:
    rows = load_coco(write_sample(tmp_path / "data", images=(1, 1, 0)))["train"]
    ours = TrainArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    stock = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for args, given, message in (
        (stock, {}, "expected m2f_trainer's TrainArguments, got TrainingArguments"),
        (ours, {"data_collator": list}, "data_collator: M2FTrainer has its own"),
        (ours, {"train_dataset": rows}, r"InstanceDataset\(rows, TrainTransform"),
    ):
        with pytest.raises(TypeError, match=message):
            M2FTrainer(tiny_model(), args, **given)


def test_an_optimizer_of_the_user_is_kept(tmp_path: Path) -> None:
    model = tiny_model()
    own = torch.optim.SGD(model.parameters(), lr=1.0)
    arguments = TrainArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = M2FTrainer(model, arguments, eval_dataset=TensorDataset(torch.zeros(1)), optimizers=(own, None))
    trainer.create_optimizer_and_scheduler(10)
    assert trainer.optimizer is own
    factory = torch.optim.SGD, {"lr": 0.5}
    trainer = M2FTrainer(model, arguments, eval_dataset=TensorDataset(torch.zeros(1)), optimizer_cls_and_kwargs=factory)
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)
