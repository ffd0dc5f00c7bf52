"""The operators that are run from a TorchScript file: a closed list, since the file is not trusted.

It has no operator that opens files (`from_file`, `save`), prints, starts threads, calls other machines, or places a
tensor on another's memory, and none of other libraries.
"""

from __future__ import annotations

from lora_export.models.pt2.prepared_graph import OPERATORS as OF_PROGRAMS

TENSOR_OPERATORS = """
    __iand__ __ior__ __lshift__ __rshift__ _batch_norm_impl_index _cast_Double _cast_Float _cast_Half _cast_Long
    _convolution _convolution_mode _grouped_mm _native_multi_head_attention _pack_padded_sequence
    _pad_packed_sequence _scaled_dot_product_flash_attention_for_cpu _shape_as_tensor
    _transformer_encoder_layer_fwd _unique2 _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d absolute affine_grid_generator
    alpha_dropout aminmax angle atleast_1d atleast_2d atleast_3d bartlett_window bernoulli binary_cross_entropy
    binary_cross_entropy_with_logits bincount blackman_window block_diag cartesian_prod chain_matmul
    channel_shuffle clip col2im combinations complex conj cosine_embedding_loss cpu cross cross_entropy_loss
    cuda cudnn_is_acceptable cummax cummin data det device dim dtype embedding_bag empty empty_like
    empty_permuted empty_strided feature_alpha_dropout fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill_diagonal_ fix fliplr flipud float_power
    fractional_max_pool2d frobenius_norm gcd geqrf ger greater greater_equal grid_sampler gru gru_cell
    hamming_window hann_window heaviside histc hsplit huber_loss i0 imag inverse is_complex is_contiguous
    is_cuda is_floating_point is_grad_enabled is_inference is_leaf isclose isin isreal istft kaiser_window
    kl_div kron l1_loss lcm ldexp less less_equal linalg_cross linalg_det linalg_eigh linalg_inv
    linalg_matrix_norm linalg_multi_dot linalg_qr linalg_solve linalg_svd log_sigmoid_forward logcumsumexp
    logdet lstm lstm_cell matrix_exp matrix_power max_unpool2d moveaxis mse_loss msort multinomial multiply
    native_batch_norm native_group_norm negative new_empty nll_loss nll_loss2d nll_loss_nd normal not_equal
    nuclear_norm numel pairwise_distance pdist pinverse polar positive promote_types q_scale quantile rand
    rand_like randint randint_like randn randn_like randperm range real requires_grad_ resolve_conj resolve_neg
    result_type rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell rrelu searchsorted set_grad_enabled size slogdet
    smooth_l1_loss special_erf special_expit special_softmax stft stride subtract tensor to_dense trace trapz
    triplet_margin_loss uniform_ unique_consecutive unique_dim unsafe_chunk unsafe_split unsafe_split_with_sizes
    vander vdot view_as_complex view_as_real vsplit
"""
# On numbers, strings, lists and dicts.
VALUE_OPERATORS = """
    Bool Complex Float FloatImplicit Int IntImplicit ScalarImplicit __contains__ __derive_index __getitem__
    __is__ __isnot__ __not__ __range_length _set_item _unwrap_optional append clear degrees dict endswith extend
    find floordiv format get get_device hash insert isdigit items join keys len list lower lstrip mathremainder
    ord pop popitem radians remove replace reverse rstrip setdefault sorted splitlines startswith str strip
    title update upper values warn
"""
PRIMITIVE_OPERATORS = """
    NumToTensor RaiseException TupleIndex TupleUnpack abs data device dtype grad index is_cuda is_meta is_nested
    itemsize layout max min requires_grad type unchecked_cast
"""
# Of the language itself.
BUILTIN_FUNCTIONS = """
    Exception abs annotate bool float getattr int isinstance len max min range round str unchecked_cast uninitialized
    unchecked_unwrap_optional
"""
PRIMITIVES, BUILTINS = frozenset(PRIMITIVE_OPERATORS.split()), frozenset(BUILTIN_FUNCTIONS.split())


def _with_in_place(names: frozenset[str]) -> frozenset[str]:
    return names | {f"{name}_" for name in names if not name.endswith("_")}


SCRIPT_OPERATORS = _with_in_place(OF_PROGRAMS | frozenset(TENSOR_OPERATORS.split())) | frozenset(
    VALUE_OPERATORS.split()
)
