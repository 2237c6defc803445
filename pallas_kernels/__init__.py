"""Attention and matmuls for inference: arrays in, arrays out, several implementations behind one signature each.

    dense_matmul        few tokens times a weight
    flash_attention     contiguous keys and values
    grouped_matmul      rows of several groups, each with a weight of its own
    paged_attention     a paged pool, written and read in one call; `kv_layout` names the pool's layout
    quantized_matmul    weights in int8, float8 or 4 bits
    residual_norm       a sum and its root mean square norm
    token_chain         tokens through matmuls that follow one another

`dispatch` chooses the implementation, `tuning` its block sizes.
"""

from pallas_kernels.attention import AttentionSpec as AttentionSpec
from pallas_kernels.counters import shared_counters as shared_counters
from pallas_kernels.dense_matmul.api import dense_matmul as dense_matmul
from pallas_kernels.flash_attention.api import SegmentIds as SegmentIds
from pallas_kernels.flash_attention.api import flash_attention as flash_attention
from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from pallas_kernels.norm import rms_norm as rms_norm
from pallas_kernels.paged_attention.api import PagedMetadata as PagedMetadata
from pallas_kernels.paged_attention.api import PagedResult as PagedResult
from pallas_kernels.paged_attention.api import kv_layout as kv_layout
from pallas_kernels.paged_attention.api import paged_attention as paged_attention
from pallas_kernels.paged_attention.pool import KVLayout as KVLayout
from pallas_kernels.paged_attention.pool import Pool as Pool
from pallas_kernels.paged_attention.pool import QuantizedKV as QuantizedKV
from pallas_kernels.paged_attention.pool import code_dtype as code_dtype
from pallas_kernels.quantized_matmul.api import quantized_matmul as quantized_matmul
from pallas_kernels.residual_norm.api import residual_norm as residual_norm
from pallas_kernels.residual_norm.reference import Normed as Normed
from pallas_kernels.token_chain.api import Chained as Chained
from pallas_kernels.token_chain.api import joins as joins
from pallas_kernels.token_chain.api import token_chain as token_chain
from pallas_kernels.token_chain.reference import Form as Form
from pallas_kernels.token_chain.reference import Weight as Weight
