"""The named conversion from packed weights back to dense ones, inserted where a stage needs dense weights."""

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.scheme import packing_memory
from stages.runtime.stage_work import publishing, reading


class Dequantize(Stage):
    """Multiply every packed weight out into the model's dtype, as transformers does when it loads the checkpoint.

    Streams tensor by tensor. Nothing of the format is left over: no scales, no `quantization_config`, no rounding of what the weights
    are multiplied with.
    """

    name, version = "dequantize", 1
    keeps_weights = True
    libraries = ("torch", "compressed-tensors")

    def infer(self, model: ModelSpec) -> ModelSpec:
        return model.dense()

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        return packing_memory(model.dense(), model, writes=model.dense())

    def work(self, model: ModelSpec) -> Work:
        return reading(model) + publishing(model.dense())

    def explain(self, model: ModelSpec) -> list[str]:
        said = [
            "the rounding error is now baked into dense weights; the bytes saved are lost until a quantize stage runs again "
            f"({model.bits_per_weight:.2f} -> {model.dense().bits_per_weight:.2f} bits per weight)"
        ]
        if any(group.format.rounds_inputs for group in model.linear_groups):
            said.append("inputs of the layers are rounded no more: dense weights alone compute closer to the source model")
        return said

    def run(self, ctx: Context, model: QuantizedCheckpoint) -> DenseCheckpoint:
        from stages.runtime.packing import packed_formats, unpack_weight
        from stages.runtime.tensors import DTYPES, CheckpointWriter, TensorReader, copy_companions

        source, reader = model.model_spec, TensorReader(model.path)
        spec, formats, dtype = source.dense(), packed_formats(source), DTYPES[source.dtype]
        dense = spec.tensors()
        modules = {f"{module}.{form.stored}": module for module, form in formats.items()}
        names = [f"{modules[name]}.weight" if name in modules else name for name in reader.table]
        with CheckpointWriter(ctx.output, {name: dense[name] for name in names if name in dense}) as writer:
            for done, name in enumerate(reader.table, 1):
                module = modules.get(name, "")
                if module:
                    parts = formats[module].tensors((1, 1), source.dtype)
                    packed = {part: reader.read(f"{module}.{part}") for part in parts}
                    writer.add(f"{module}.weight", unpack_weight(packed, formats[module], dtype))
                elif name in dense:
                    writer.copy(name, reader)
                ctx.progress("writing", done, len(reader.table))
        config = {key: value for key, value in model.config.items() if key != "quantization_config"}
        copy_companions(model.path, ctx.output, config)
        return DenseCheckpoint(path=ctx.output, spec=spec)
