"""The command line: a YAML file becomes objects, and one of the trainer's methods runs them."""

from __future__ import annotations

import copy
import inspect
import re
import signal
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from functools import cache, partial
from importlib import import_module
from pkgutil import resolve_name
from typing import Any, NoReturn, cast

from jsonargparse import Namespace, _typehints, add_instantiator, auto_cli, set_parsing_settings
from lightning import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.optim.lr_scheduler import LRScheduler

from vlmembed.data import Pages, Table
from vlmembed.distributed import print_once
from vlmembed.modules import RetrievalModule
from vlmembed.modules.optimization import STEP_PARAMETERS, SchedulerCallable
from vlmembed.secrets import refuse_secrets, refuse_secrets_in
from vlmembed.trainer import Trainer
from vlmembed.training.run_folder import LAST, SaveConfiguration, fit_folder, other_folder
from vlmembed.training.signals import end_with_parent

#: Commands with a parser of their own, in modules that nothing below knows. The module's ``main`` runs them or, where
#: it has none, its function of the command's name, whose arguments are the options.
COMMANDS = {
    "ablate": ("vlmembed.ablation.command", "Run a grid of settings and seeds; report which differences are real."),
    "benchmark": ("vlmembed.benchmark.command", "Measure a model by mteb: tasks and benchmarks by name, or folders."),
    "encode": ("vlmembed.search.encoding", "Encode a corpus of any size into an index of Parquet files."),
    "mine": ("vlmembed.mining.mining", "Find hard negatives for training rows with an embedder."),
    "score": ("vlmembed.mining.mining", "Add a reranker's scores to training rows."),
    "search": ("vlmembed.search.searching", "Find the documents of an index that are nearest to queries."),
    "show": ("vlmembed.show", "Show the first rows as the model will read them; write a page with their images."),
}

# Of dataclasses, jsonargparse takes the first that fits, whatever class is named, unless it is told otherwise.
set_parsing_settings(subclasses_enabled=[Table, Pages])


class Parser(LightningArgumentParser):
    """Lightning's parser, which opens no file but the one of ``--config``, and knows what schedules want.

    jsonargparse takes a string for the path of a configuration wherever a class may stand, so that a data set named by
    its path would be parsed as configuration, and could name classes to import and run.
    """

    def _add_signature_parameter(
        self, container: Any, nested_key: str | None, param: Any, *args: Any, **options: Any
    ) -> None:
        """Add a parameter; one of a schedule may be left out if the module knows it, and schedules within are made."""
        if _is_schedule(param.parent or param.component):
            if param.name in STEP_PARAMETERS:
                param = replace(param, default=None)
            elif param.name == "schedulers":
                param = replace(param, annotation=list[SchedulerCallable])
        if param.annotation is str and isinstance(param.default, Enum):  # Which no YAML could hold; Timer has one.
            param = replace(param, default=param.default.value)
        super()._add_signature_parameter(container, nested_key, param, *args, **{**options, "sub_configs": False})

    def add_class_arguments(self, class_type: Any, *args: Any, **options: Any) -> Any:
        """Add those of a class. The optimizer is given by the module, wherever among a schedule's it stands."""
        if options.get("skip") and _is_schedule(class_type):
            options["skip"] = {"optimizer"}
        return super().add_class_arguments(class_type, *args, **options)

    def add_function_arguments(self, function: Any, *args: Any, **options: Any) -> Any:
        """Add those of a function. One that takes an optimizer, such as transformers' schedules, is called later."""
        if _is_schedule(function):
            later: Any = lambda schedule, **values: partial(schedule, **values)  # noqa: E731
            add_instantiator(later, function, subclasses=False)
            options |= {"skip": {"optimizer"}, "fail_untyped": False}
        return super().add_function_arguments(function, *args, **options)

    def add_subcommands(self, *args: Any, **options: Any) -> Any:
        """Add those of Lightning, and list those that have a parser of their own."""
        commands = super().add_subcommands(*args, **options)
        for name, (_, description) in COMMANDS.items():
            commands.add_subcommand(name, Parser(description=description), help=description)
        return commands

    def instantiate_classes(self, *args: Any, **options: Any) -> Any:
        """Build the objects. What a class refuses comes last, without the types that its place would take as well."""
        try:
            return super().instantiate_classes(*args, **options)
        except ValueError as error:
            reasons = re.findall(r"^ *- (?!Expected a|Does not validate)(.+)", str(error), re.MULTILINE)
            if not reasons or not str(error).startswith("Does not validate"):
                raise
            raise ValueError("\n".join(reasons)) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what a class takes, where it is given something else."""
        refused = re.search(r"class_path '([\w.]+)':\s+Option '(\w+)[\w.]*' is not accepted", message)
        if refused is not None:
            keys = Parser().add_class_arguments(resolve_name(refused[1]), fail_untyped=False)
            options = dict.fromkeys(key.split(".")[0] for key in keys)  # Some have options of their own.
            message += f"\n{refused[1]} has no {refused[2]}. It takes {', '.join(options)}."
        super().error(message, ex)


def _is_schedule(target: Any) -> bool:
    """Whether something is a class of schedules, or a function that makes one."""
    if isinstance(target, type):
        return issubclass(target, LRScheduler)
    return inspect.isfunction(target) and "optimizer" in inspect.signature(target).parameters


def _discard_arguments(_: Any, before: Any, now: Any) -> None:
    """Let no argument of a class survive naming another; jsonargparse would keep those that both have."""
    if before and "init_args" in before and before["class_path"] != now["class_path"]:
        before["init_args"] = Namespace()


_typehints.discard_init_args_on_class_path_change = _discard_arguments


class CLI(LightningCLI):
    """Lightning's command line with ``export``, and with measuring before and exporting after ``fit``."""

    trainer: Trainer

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=Trainer,
            parser_class=Parser,
            save_config_callback=SaveConfiguration,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "exporter": {"class_path": "vlmembed.export.SentenceTransformers"},
                # The data module shards by itself, in whole batches.
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            # The modules build their own, after the weights are loaded and the adapters are in.
            auto_configure_optimizers=False,
            parser_kwargs={"description": "Turns vision-language models into embedders and rerankers."},
            args=args,
        )

    def before_instantiate_classes(self) -> None:
        """Refuse secrets, before anything is written."""
        refuse_secrets(self.config.as_dict())

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, each a method of the trainer, and which of their arguments are not options."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the method, in a folder of its own or in that of the run that it resumes."""
        arguments = self.config_init[subcommand]
        path = arguments.get("ckpt_path")
        if not isinstance(self.trainer.logger, CSVLogger):
            if path == LAST:
                raise ValueError("--ckpt_path last looks in the logger's folder, and trainer.logger is false.")
            super()._run_subcommand(subcommand)
            return
        folder = fit_folder if subcommand == "fit" else partial(other_folder, writes=subcommand != "export")
        with folder(self.trainer, path) as arguments["ckpt_path"]:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Measure the fresh model, unless the run is resumed, and refuse to wait for what is not measured."""
        if self.trainer.exporter is not None and isinstance(self.model, RetrievalModule):
            self.trainer.exporter.check(self.model.encoder.pooling)
        self._before = {}
        if not self._get(self.config_init, "ckpt_path") and not self.trainer.fast_dev_run:
            self._before = self._measure()
            for callback in self.trainer.callbacks:
                _refuse_unmeasured(callback, [name for name in self._before if name.startswith("val/")])

    def after_fit(self) -> None:
        """Measure and export the best checkpoint, or the last weights where no metric decides."""
        if not self.trainer.global_step:
            print_once("Nothing was trained: the run took no step (see trainer.limit_train_batches and max_steps).")
            return
        best = self.trainer.best_checkpoint()
        after = self._measure(best)
        for name, value in after.items():
            first_stage = f"{after[f'{name}/before']:.3f} before reranking, " if f"{name}/before" in after else ""
            before = f"{self._before[name]:.3f} before training, " if name in self._before else ""
            if name.endswith("ndcg@10"):
                print_once(f"{name}: {first_stage}{before}{value:.3f} after")
        if self.trainer.exporter is not None and not self.trainer.fast_dev_run and not self._was_finished():
            self.trainer.export(self.model, self.datamodule, best)

    def _was_finished(self) -> bool:
        """Whether the run that was resumed had nothing left to do, so that scripts may say ``last`` always."""
        export = self.trainer.export_folder
        finished = export.exists() and self.trainer.global_step == self.trainer.steps_before
        if finished:
            print_once(f"The run had finished, and its export is in {export}.")
        return finished

    def _measure(self, ckpt_path: str | None = None) -> dict[str, float]:
        """Measure on every evaluation set that the data module has."""
        results: dict[str, float] = {}
        if self.trainer.fast_dev_run:
            return results
        for stage, run in (("val", self.trainer.validate), ("test", self.trainer.test)):
            if getattr(self.datamodule, stage, None):
                for metrics in run(self.model, datamodule=self.datamodule, ckpt_path=ckpt_path, verbose=False):
                    results |= metrics
        return results

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        if not config.get("barebones"):  # Which logs nothing.
            config["logger"] = _with_csv(config.get("logger"), config.get("default_root_dir"))
        trainer = cast(Trainer, super()._instantiate_trainer(config, callbacks))
        trainer.run_config = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        return trainer


def _refuse_unmeasured(callback: Callback, measured: list[str]) -> None:
    monitor = str(getattr(callback, "monitor", None))
    if monitor.startswith(("val/", "test/")) and monitor not in measured:
        raise ValueError(
            f"{type(callback).__name__}(monitor: {monitor}): training does not measure that. It measures "
            f"{', '.join(measured) or 'nothing: give data.val, and do not limit trainer.limit_val_batches to 0'}."
        )


def _with_csv(logger: Logger | list[Logger] | bool | None, root: str | None) -> list[Logger] | bool:
    """Put a CSV logger first where there is none: ``metrics.csv`` is always written, and its folder is the run's."""
    if logger is False:
        return False
    loggers = logger if isinstance(logger, list) else [logger] if isinstance(logger, Logger) else []
    if any(isinstance(entry, CSVLogger) for entry in loggers):
        return sorted(loggers, key=lambda entry: not isinstance(entry, CSVLogger))
    return [CSVLogger(root or "runs", name="run"), *loggers]


class _Checker(CLI):
    """The command line without its end: it parses, and builds nothing."""

    def _add_instantiators(self) -> None:
        """Remember nothing of what is built, for checkpoints that are not written."""

    def parse_arguments(self, parser: Any, args: ArgsType) -> None:
        self.config = Namespace(subcommand=None, seed_everything=False)

    def instantiate_classes(self) -> None:
        pass

    def check(self, config: dict[str, Any]) -> None:
        parser = self._parser("fit")
        parser.exit_on_error = False
        try:
            parser.parse_object(copy.deepcopy(config))
        except ArgumentError as error:
            # Its causes are the parser's own steps; its text has them all.
            raise ValueError(str(error)) from None


@cache
def _checker() -> _Checker:
    return _Checker()


def check(config: dict[str, Any]) -> None:
    """Try whether a mapping is a configuration of ``fit``, building nothing of it; a ValueError says what is wrong."""
    _checker().check(config)


def build(words: Sequence[str], **options: tuple[Any, str]) -> Namespace:
    """Build the model and the data module of a command line: a command's name, the arguments of ``fit`` and options.

    An option has a default and a help text. Nothing else is built: no trainer, no logger.
    """
    parser, (command, *args) = _Checker()._parser("fit"), words
    parser.prog, parser.description = f"python -m vlmembed {command}", COMMANDS[command][1]
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    config = parser.parse_args(args)
    refuse_secrets(config.as_dict())
    if config.seed_everything is not True:
        seed_everything(config.seed_everything)
    objects = parser.instantiate_classes(Namespace(model=config.model, data=config.data))
    return Namespace(**vars(objects), **{name: config[name] for name in options})


def run_function(function: Callable[..., None], words: Sequence[str]) -> None:
    """Run a function by a command line, the command's name and options, which are the function's arguments."""
    name, *args = words
    auto_cli(function, args=args, prog=f"python -m vlmembed {name}", as_positional=False, parser_class=Parser)


def main(args: ArgsType = None) -> None:
    """Run one command: a command line without the program's name, or the process's own."""
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list):
        refuse_secrets_in(words)
    try:
        if isinstance(words, list) and words and words[0] in COMMANDS:
            module = import_module(COMMANDS[words[0]][0])
            if hasattr(module, "main"):
                module.main(words)
            else:
                run_function(getattr(module, words[0]), words)
        else:
            end_with_parent()
            CLI(args)
    except (KeyboardInterrupt, SystemExit) as error:  # Of Ctrl-C, Ray and Lightning would make a status of 1.
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        raise
