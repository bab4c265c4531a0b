"""A model in other formats: written, loaded again, and measured against what it was made of.

    packages            which optional package is here; one sentence for each that is not
    quantised           folders for transformers: fp16, bf16, torchao, bitsandbytes; torch's dynamic int8
    k_quants            llama.cpp's K-quants, encoded
    gguf_tokenizer gguf_file        GGUF, and when llama.cpp may tokenise for itself
    onnx_page onnx_files            ONNX with a KV cache, and the page that runs it
    formats             all of them by name
    llama_cpp onnx_model runners    each of them asked the same
    worker measure claims           one process a format; equal tokens, loss, speed; what the cards say
"""
from stentor.export.claims import claims_table                                                  # noqa: F401
from stentor.export.formats import (                                                            # noqa: F401
    FIVE_LINES, FORMATS, local_folder, model_problem, skipped, write_format)
from stentor.export.gguf_file import write_gguf                                                 # noqa: F401
from stentor.export.gguf_tokenizer import longest_match_share, why_not_gpt2                     # noqa: F401
from stentor.export.llama_cpp import LlamaCpp                                                   # noqa: F401
from stentor.export.measure import (                                                            # noqa: F401
    MeasuringFailed, compare, held_out, measure_format)
from stentor.export.onnx_files import write_onnx                                                # noqa: F401
from stentor.export.onnx_model import OnnxModel                                                 # noqa: F401
from stentor.export.packages import PINNED, missing                                             # noqa: F401
from stentor.export.quantised import bytes_held, load_dynamic_int8                              # noqa: F401
