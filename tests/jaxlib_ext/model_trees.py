"""The parameters of public models: names, shapes and the right labels.

One line for each leaf of a layer, in the layout of the code that is named:
kernels [in, out] in flax, haiku and equinox-like code that says so, weights
[out, in] in PyTorch's. Labels: m(atrix), e(mbedding), h(ead), v(ector). A part
"#" stands for the index of a layer; `per_layer` writes two of them, `stacked`
one whose leaves have the layers as their first axis.
"""

from __future__ import annotations

LABELS = {"m": "matrix", "e": "embedding", "h": "head", "v": "vector"}

# Hugging Face, modeling_flax_gpt2.py; its Conv1D keeps kernels [out, in].
GPT2_FLAX = """
transformer/wte/embedding 50257x768 e
transformer/wpe/embedding 1024x768 e
transformer/h/#/ln_1/scale 768 v
transformer/h/#/ln_1/bias 768 v
transformer/h/#/attn/c_attn/kernel 2304x768 m
transformer/h/#/attn/c_attn/bias 2304 v
transformer/h/#/attn/c_proj/kernel 768x768 m
transformer/h/#/attn/c_proj/bias 768 v
transformer/h/#/ln_2/scale 768 v
transformer/h/#/mlp/c_fc/kernel 3072x768 m
transformer/h/#/mlp/c_fc/bias 3072 v
transformer/h/#/mlp/c_proj/kernel 768x3072 m
transformer/ln_f/scale 768 v
"""

# karpathy/nanoGPT, model.py (lm_head shares wte's weight).
NANOGPT = """
transformer.wte.weight 50304x768 e
transformer.wpe.weight 1024x768 e
transformer.h.#.ln_1.weight 768 v
transformer.h.#.attn.c_attn.weight 2304x768 m
transformer.h.#.attn.c_attn.bias 2304 v
transformer.h.#.attn.c_proj.weight 768x768 m
transformer.h.#.mlp.c_fc.weight 3072x768 m
transformer.h.#.mlp.c_proj.weight 768x3072 m
transformer.ln_f.weight 768 v
lm_head.weight 50304x768 h
"""

# AI-Hypercomputer/maxtext, layers/decoders.py and models/llama2.py, scanned:
# `param_scan_axis=0` here. Attention kernels (embed, heads, head_dim).
MAXTEXT = """
params/token_embedder/embedding 32000x4096 e
params/decoder/layers/#/pre_self_attention_layer_norm/scale 4096 v
params/decoder/layers/#/self_attention/query/kernel 4096x32x128 m
params/decoder/layers/#/self_attention/key/kernel 4096x8x128 m
params/decoder/layers/#/self_attention/value/kernel 4096x8x128 m
params/decoder/layers/#/self_attention/out/kernel 32x128x4096 m
params/decoder/layers/#/post_self_attention_layer_norm/scale 4096 v
params/decoder/layers/#/mlp/wi_0/kernel 4096x11008 m
params/decoder/layers/#/mlp/wi_1/kernel 4096x11008 m
params/decoder/layers/#/mlp/wo/kernel 11008x4096 m
params/decoder/layers/#/MoeBlock_0/gate/kernel 4096x8 m
params/decoder/layers/#/MoeBlock_0/wi_0 8x4096x14336 m
params/decoder/layers/#/MoeBlock_0/wi_1 8x4096x14336 m
params/decoder/layers/#/MoeBlock_0/wo 8x14336x4096 m
params/decoder/decoder_norm/scale 4096 v
params/decoder/logits_dense/kernel 4096x32000 h
"""

# EleutherAI/gpt-neox as transformers' modeling_gpt_neox.py.
NEOX = """
gpt_neox.embed_in.weight 50432x6144 e
gpt_neox.layers.#.input_layernorm.weight 6144 v
gpt_neox.layers.#.input_layernorm.bias 6144 v
gpt_neox.layers.#.post_attention_layernorm.weight 6144 v
gpt_neox.layers.#.attention.query_key_value.weight 18432x6144 m
gpt_neox.layers.#.attention.query_key_value.bias 18432 v
gpt_neox.layers.#.attention.dense.weight 6144x6144 m
gpt_neox.layers.#.attention.dense.bias 6144 v
gpt_neox.layers.#.mlp.dense_h_to_4h.weight 24576x6144 m
gpt_neox.layers.#.mlp.dense_4h_to_h.weight 6144x24576 m
gpt_neox.final_layer_norm.weight 6144 v
embed_out.weight 50432x6144 h
"""

# meta-llama/llama, llama/model.py.
LLAMA_META = """
tok_embeddings.weight 32000x4096 e
layers.#.attention.wq.weight 4096x4096 m
layers.#.attention.wk.weight 4096x4096 m
layers.#.attention.wv.weight 4096x4096 m
layers.#.attention.wo.weight 4096x4096 m
layers.#.feed_forward.w1.weight 11008x4096 m
layers.#.feed_forward.w2.weight 4096x11008 m
layers.#.feed_forward.w3.weight 11008x4096 m
layers.#.attention_norm.weight 4096 v
layers.#.ffn_norm.weight 4096 v
norm.weight 4096 v
output.weight 32000x4096 h
"""

# TransformerLens, components: one array per head.
TRANSFORMER_LENS = """
embed.W_E 50257x768 e
pos_embed.W_pos 1024x768 e
blocks.#.ln1.w 768 v
blocks.#.ln1.b 768 v
blocks.#.attn.W_Q 12x768x64 m
blocks.#.attn.W_K 12x768x64 m
blocks.#.attn.W_V 12x768x64 m
blocks.#.attn.W_O 12x64x768 m
blocks.#.attn.b_Q 12x64 v
blocks.#.attn.b_K 12x64 v
blocks.#.attn.b_V 12x64 v
blocks.#.attn.b_O 768 v
blocks.#.ln2.w 768 v
blocks.#.mlp.W_in 768x3072 m
blocks.#.mlp.b_in 3072 v
blocks.#.mlp.W_out 3072x768 m
blocks.#.mlp.b_out 768 v
ln_final.w 768 v
unembed.W_U 768x50257 h
unembed.b_U 50257 v
"""

# timm, models/vision_transformer.py with a class token and layer scale.
TIMM_VIT = """
cls_token 1x1x768 v
reg_token 1x4x768 v
pos_embed 1x197x768 e
patch_embed.proj.weight 768x3x16x16 m
patch_embed.proj.bias 768 v
blocks.#.norm1.weight 768 v
blocks.#.attn.qkv.weight 2304x768 m
blocks.#.attn.qkv.bias 2304 v
blocks.#.attn.proj.weight 768x768 m
blocks.#.ls1.gamma 768 v
blocks.#.norm2.weight 768 v
blocks.#.mlp.fc1.weight 3072x768 m
blocks.#.mlp.fc2.weight 768x3072 m
norm.weight 768 v
head.weight 1000x768 h
head.bias 1000 v
"""

# timm, models/convnext.py and models/layers/classifier.py.
TIMM_CONVNEXT = """
stem.0.weight 96x3x4x4 m
stem.1.weight 96 v
stages.0.blocks.#.gamma 96 v
stages.0.blocks.#.conv_dw.weight 96x1x7x7 v
stages.0.blocks.#.norm.weight 96 v
stages.0.blocks.#.mlp.fc1.weight 384x96 m
stages.0.blocks.#.mlp.fc2.weight 96x384 m
stages.1.downsample.0.weight 96 v
stages.1.downsample.1.weight 192x96x2x2 m
head.norm.weight 768 v
head.fc.weight 1000x768 h
head.fc.bias 1000 v
"""

# google/flax, examples/lm1b/models.py, untied: the parts of "decoder".
FLAX_LM1B = """
Embed_0/embedding 30000x512 e
posembed_output/pos_embedding 1x2048x512 e
encoderdecoderblock_#/LayerNorm_0/scale 512 v
encoderdecoderblock_#/LayerNorm_0/bias 512 v
encoderdecoderblock_#/SelfAttention_0/query/kernel 512x8x64 m
encoderdecoderblock_#/SelfAttention_0/out/kernel 8x64x512 m
encoderdecoderblock_#/LayerNorm_1/scale 512 v
encoderdecoderblock_#/MlpBlock_0/Dense_0/kernel 512x2048 m
encoderdecoderblock_#/MlpBlock_0/Dense_0/bias 2048 v
encoderdecoderblock_#/MlpBlock_0/Dense_1/kernel 2048x512 m
encoderdecoder_norm/scale 512 v
logitdense/kernel 512x30000 h
logitdense/bias 30000 v
"""

# google-research/vision_transformer, vit_jax/models_vit.py, the parts of
# "Transformer".
FLAX_VIT = """
cls 1x1x768 v
embedding/kernel 16x16x3x768 m
embedding/bias 768 v
posembed_input/pos_embedding 1x197x768 e
encoderblock_#/LayerNorm_0/scale 768 v
encoderblock_#/MultiHeadDotProductAttention_1/query/kernel 768x12x64 m
encoderblock_#/MultiHeadDotProductAttention_1/query/bias 12x64 v
encoderblock_#/MultiHeadDotProductAttention_1/out/kernel 12x64x768 m
encoderblock_#/MlpBlock_3/Dense_0/kernel 768x3072 m
encoderblock_#/MlpBlock_3/Dense_1/kernel 3072x768 m
encoder_norm/scale 768 v
head/kernel 768x1000 h
head/bias 1000 v
"""

# google/flax, examples/imagenet/models.py.
FLAX_RESNET = """
conv_init/kernel 7x7x3x64 m
bn_init/scale 64 v
BottleneckResNetBlock_#/Conv_0/kernel 1x1x64x64 m
BottleneckResNetBlock_#/BatchNorm_0/scale 64 v
BottleneckResNetBlock_#/Conv_1/kernel 3x3x64x64 m
BottleneckResNetBlock_#/Conv_2/kernel 1x1x64x256 m
BottleneckResNetBlock_#/conv_proj/kernel 1x1x64x256 m
BottleneckResNetBlock_#/norm_proj/scale 256 v
BottleneckResNetBlock_15/Conv_2/kernel 1x1x512x2048 m
Dense_0/kernel 2048x1000 h
Dense_0/bias 1000 v
"""

# A flax model whose layers are named automatically, logits last.
FLAX_AUTOMATIC = """
params/Embed_0/embedding 32000x512 e
params/Block_#/LayerNorm_0/scale 512 v
params/Block_#/Dense_0/kernel 512x1536 m
params/Block_#/Dense_1/kernel 512x512 m
params/LayerNorm_0/scale 512 v
params/Dense_0/kernel 512x1536 m
params/Dense_1/kernel 512x512 m
params/Dense_2/kernel 512x2048 m
params/Dense_3/kernel 2048x512 m
params/Dense_4/kernel 512x32000 h
"""

# google/flax, examples/mnist.
FLAX_MNIST = """
Conv_0/kernel 3x3x1x32 m
Conv_1/kernel 3x3x32x64 m
Dense_0/kernel 3136x256 m
Dense_0/bias 256 v
Dense_1/kernel 256x10 h
Dense_1/bias 10 v
"""

# google-deepmind/nanodo, model.py; tied.
NANODO = """
embed/embedding 32000x512 e
pos_embed/embedding 1024x512 e
blocks_#/LayerNorm_0/scale 512 v
blocks_#/CausalAttn_0/query/kernel 512x8x64 m
blocks_#/CausalAttn_0/key/kernel 512x8x64 m
blocks_#/CausalAttn_0/value/kernel 512x8x64 m
blocks_#/CausalAttn_0/attn_out_proj/kernel 8x64x512 m
blocks_#/LayerNorm_1/scale 512 v
blocks_#/Mlp_0/Dense_0/kernel 512x2048 m
blocks_#/Mlp_0/Dense_1/kernel 2048x512 m
out_ln/scale 512 v
"""

# Hugging Face, modeling_bert.py, BertForMaskedLM; the decoder untied.
BERT = """
bert.embeddings.word_embeddings.weight 30522x768 e
bert.embeddings.position_embeddings.weight 512x768 e
bert.embeddings.token_type_embeddings.weight 2x768 e
bert.embeddings.LayerNorm.weight 768 v
bert.encoder.layer.#.attention.self.query.weight 768x768 m
bert.encoder.layer.#.attention.self.query.bias 768 v
bert.encoder.layer.#.attention.self.key.weight 768x768 m
bert.encoder.layer.#.attention.self.value.weight 768x768 m
bert.encoder.layer.#.attention.output.dense.weight 768x768 m
bert.encoder.layer.#.attention.output.LayerNorm.weight 768 v
bert.encoder.layer.#.intermediate.dense.weight 3072x768 m
bert.encoder.layer.#.output.dense.weight 768x3072 m
bert.encoder.layer.#.output.LayerNorm.weight 768 v
bert.pooler.dense.weight 768x768 m
cls.predictions.bias 30522 v
cls.predictions.transform.dense.weight 768x768 m
cls.predictions.transform.LayerNorm.weight 768 v
cls.predictions.decoder.weight 30522x768 h
"""

# Hugging Face, modeling_roberta.py, RobertaForMaskedLM.
ROBERTA = """
roberta.embeddings.word_embeddings.weight 50265x768 e
roberta.embeddings.position_embeddings.weight 514x768 e
roberta.embeddings.token_type_embeddings.weight 1x768 e
roberta.encoder.layer.#.attention.self.query.weight 768x768 m
roberta.encoder.layer.#.attention.output.dense.weight 768x768 m
roberta.encoder.layer.#.intermediate.dense.weight 3072x768 m
roberta.encoder.layer.#.output.dense.weight 768x3072 m
lm_head.bias 50265 v
lm_head.dense.weight 768x768 m
lm_head.layer_norm.weight 768 v
lm_head.decoder.weight 50265x768 h
"""

# Hugging Face, modeling_t5.py.
T5 = """
shared.weight 32128x512 e
encoder.block.#.layer.0.SelfAttention.q.weight 384x512 m
encoder.block.#.layer.0.SelfAttention.o.weight 512x384 m
encoder.block.#.layer.0.SelfAttention.relative_attention_bias.weight 32x6 v
encoder.block.#.layer.0.layer_norm.weight 512 v
encoder.block.#.layer.1.DenseReluDense.wi_0.weight 1024x512 m
encoder.block.#.layer.1.DenseReluDense.wo.weight 512x1024 m
encoder.final_layer_norm.weight 512 v
lm_head.weight 32128x512 h
"""

# google-research/t5x, examples/t5/network.py.
T5X = """
token_embedder/embedding 32128x512 e
encoder/relpos_bias/rel_embedding 6x32 v
encoder/layers_#/pre_attention_layer_norm/scale 512 v
encoder/layers_#/attention/query/kernel 512x384 m
encoder/layers_#/attention/out/kernel 384x512 m
encoder/layers_#/mlp/wi_0/kernel 512x1024 m
encoder/layers_#/mlp/wo/kernel 1024x512 m
decoder/decoder_norm/scale 512 v
decoder/logits_dense/kernel 512x32128 h
"""

# google-deepmind/gemma, gemma/transformer.py; tied.
GEMMA = """
transformer/embedder/input_embedding 256128x2048 e
transformer/layer_#/pre_attention_norm/scale 2048 v
transformer/layer_#/attn/q_einsum/w 8x2048x256 m
transformer/layer_#/attn/kv_einsum/w 2x1x2048x256 m
transformer/layer_#/attn/attn_vec_einsum/w 8x256x2048 m
transformer/layer_#/mlp/gating_einsum 2x2048x16384 m
transformer/layer_#/mlp/linear 16384x2048 m
transformer/final_norm/scale 2048 v
"""

# state-spaces/mamba, mamba_ssm/models/mixer_seq_simple.py.
MAMBA = """
backbone.embeddings.weight 50280x768 e
backbone.layers.#.mixer.A_log 1536x16 v
backbone.layers.#.mixer.D 1536 v
backbone.layers.#.mixer.in_proj.weight 3072x768 m
backbone.layers.#.mixer.conv1d.weight 1536x1x4 v
backbone.layers.#.mixer.conv1d.bias 1536 v
backbone.layers.#.mixer.x_proj.weight 80x1536 m
backbone.layers.#.mixer.dt_proj.weight 1536x48 m
backbone.layers.#.mixer.dt_proj.bias 1536 v
backbone.layers.#.mixer.out_proj.weight 768x1536 m
backbone.layers.#.norm.weight 768 v
backbone.norm_f.weight 768 v
lm_head.weight 50280x768 h
"""

# BlinkDL/RWKV-LM, RWKV-v5 and -v6.
RWKV = """
emb.weight 65536x2048 e
blocks.#.ln0.weight 2048 v
blocks.#.att.time_mix_k 1x1x2048 v
blocks.#.att.time_maa_x 1x1x2048 v
blocks.#.att.time_maa_w1 2048x160 m
blocks.#.att.time_maa_w2 5x32x2048 m
blocks.#.att.time_decay 1x1x2048 v
blocks.#.att.time_decay_w1 2048x64 m
blocks.#.att.time_decay_w2 64x2048 m
blocks.#.att.time_faaaa 32x64 v
blocks.#.att.time_first 32x64 v
blocks.#.att.receptance.weight 2048x2048 m
blocks.#.att.output.weight 2048x2048 m
blocks.#.att.ln_x.weight 2048 v
blocks.#.ffn.key.weight 7168x2048 m
blocks.#.ffn.value.weight 2048x7168 m
ln_out.weight 2048 v
head.weight 65536x2048 h
"""

# facebookresearch/DiT, models.py.
DIT = """
x_embedder.proj.weight 1152x4x2x2 m
x_embedder.proj.bias 1152 v
t_embedder.mlp.0.weight 1152x256 m
t_embedder.mlp.2.weight 1152x1152 m
y_embedder.embedding_table.weight 1001x1152 e
pos_embed 1x256x1152 e
blocks.#.attn.qkv.weight 3456x1152 m
blocks.#.attn.proj.weight 1152x1152 m
blocks.#.mlp.fc1.weight 4608x1152 m
blocks.#.mlp.fc2.weight 1152x4608 m
blocks.#.adaLN_modulation.1.weight 6912x1152 m
blocks.#.adaLN_modulation.1.bias 6912 v
final_layer.linear.weight 32x1152 h
final_layer.adaLN_modulation.1.weight 2304x1152 m
"""

# Hugging Face diffusers, transformer_flux.py.
FLUX = """
time_text_embed.timestep_embedder.linear_1.weight 3072x256 m
time_text_embed.timestep_embedder.linear_2.weight 3072x3072 m
time_text_embed.guidance_embedder.linear_1.weight 3072x256 m
time_text_embed.text_embedder.linear_1.weight 3072x768 m
context_embedder.weight 3072x4096 m
x_embedder.weight 3072x64 m
transformer_blocks.#.norm1.linear.weight 18432x3072 m
transformer_blocks.#.norm1.linear.bias 18432 v
transformer_blocks.#.norm1_context.linear.weight 18432x3072 m
transformer_blocks.#.attn.norm_q.weight 128 v
transformer_blocks.#.attn.norm_added_k.weight 128 v
transformer_blocks.#.attn.to_q.weight 3072x3072 m
transformer_blocks.#.attn.to_out.0.weight 3072x3072 m
transformer_blocks.#.attn.add_q_proj.weight 3072x3072 m
transformer_blocks.#.attn.to_add_out.weight 3072x3072 m
transformer_blocks.#.ff.net.0.proj.weight 12288x3072 m
transformer_blocks.#.ff.net.2.weight 3072x12288 m
transformer_blocks.#.ff_context.net.2.weight 3072x12288 m
single_transformer_blocks.#.norm.linear.weight 9216x3072 m
single_transformer_blocks.#.proj_mlp.weight 12288x3072 m
single_transformer_blocks.#.proj_out.weight 3072x15360 m
norm_out.linear.weight 6144x3072 m
proj_out.weight 64x3072 h
"""

# Hugging Face diffusers, transformer_sd3.py and pixart_transformer_2d.py.
SD3 = """
pos_embed.proj.weight 1536x16x2x2 m
time_text_embed.timestep_embedder.linear_1.weight 1536x256 m
context_embedder.weight 1536x4096 m
transformer_blocks.#.scale_shift_table 6x1536 v
transformer_blocks.#.norm1.linear.weight 9216x1536 m
transformer_blocks.#.attn.to_q.weight 1536x1536 m
transformer_blocks.#.ff.net.0.proj.weight 6144x1536 m
norm_out.linear.weight 3072x1536 m
proj_out.weight 64x1536 h
"""

# openai/CLIP as transformers' modeling_clip.py.
CLIP = """
logit_scale 1 v
text_model.embeddings.token_embedding.weight 49408x512 e
text_model.embeddings.position_embedding.weight 77x512 e
text_model.encoder.layers.#.self_attn.q_proj.weight 512x512 m
text_model.encoder.layers.#.self_attn.out_proj.weight 512x512 m
text_model.encoder.layers.#.layer_norm1.weight 512 v
text_model.encoder.layers.#.mlp.fc1.weight 2048x512 m
text_model.final_layer_norm.weight 512 v
vision_model.embeddings.class_embedding 768 v
vision_model.embeddings.patch_embedding.weight 768x3x32x32 m
vision_model.embeddings.position_embedding.weight 50x768 e
vision_model.pre_layrnorm.weight 768 v
vision_model.encoder.layers.#.self_attn.q_proj.weight 768x768 m
vision_model.post_layernorm.weight 768 v
visual_projection.weight 512x768 m
text_projection.weight 512x512 m
"""

# openai/CLIP, clip/model.py.
CLIP_OPENAI = """
positional_embedding 77x512 e
text_projection 512x512 m
logit_scale 1 v
visual.class_embedding 768 v
visual.positional_embedding 50x768 e
visual.proj 768x512 m
visual.conv1.weight 768x3x32x32 m
visual.ln_pre.weight 768 v
token_embedding.weight 49408x512 e
transformer.resblocks.#.attn.in_proj_weight 1536x512 m
transformer.resblocks.#.attn.in_proj_bias 1536 v
transformer.resblocks.#.attn.out_proj.weight 512x512 m
transformer.resblocks.#.ln_1.weight 512 v
transformer.resblocks.#.mlp.c_fc.weight 2048x512 m
transformer.resblocks.#.mlp.c_proj.weight 512x2048 m
ln_final.weight 512 v
"""

# Hugging Face, modeling_whisper.py.
WHISPER = """
model.encoder.conv1.weight 384x80x3 m
model.encoder.conv2.weight 384x384x3 m
model.encoder.embed_positions.weight 1500x384 e
model.encoder.layers.#.self_attn.k_proj.weight 384x384 m
model.encoder.layers.#.self_attn_layer_norm.weight 384 v
model.encoder.layers.#.fc1.weight 1536x384 m
model.encoder.layers.#.fc2.weight 384x1536 m
model.encoder.layer_norm.weight 384 v
model.decoder.embed_tokens.weight 51865x384 e
model.decoder.embed_positions.weight 448x384 e
model.decoder.layers.#.encoder_attn.out_proj.weight 384x384 m
model.decoder.layer_norm.weight 384 v
proj_out.weight 51865x384 h
"""

# Hugging Face, modeling_llama.py with Mixtral's and DeepSeek-V3's layers.
HF_MOE = """
model.embed_tokens.weight 129280x7168 e
model.layers.#.input_layernorm.weight 7168 v
model.layers.#.self_attn.q_a_proj.weight 1536x7168 m
model.layers.#.self_attn.q_a_layernorm.weight 1536 v
model.layers.#.self_attn.q_b_proj.weight 24576x1536 m
model.layers.#.self_attn.kv_a_proj_with_mqa.weight 576x7168 m
model.layers.#.self_attn.kv_a_layernorm.weight 512 v
model.layers.#.self_attn.kv_b_proj.weight 32768x512 m
model.layers.#.self_attn.o_proj.weight 7168x16384 m
model.layers.#.mlp.gate.weight 256x7168 m
model.layers.#.mlp.gate.e_score_correction_bias 256 v
model.layers.#.mlp.experts.0.gate_proj.weight 2048x7168 m
model.layers.#.mlp.experts.0.down_proj.weight 7168x2048 m
model.layers.#.mlp.shared_experts.up_proj.weight 2048x7168 m
model.layers.#.block_sparse_moe.gate.weight 8x7168 m
model.layers.#.block_sparse_moe.experts.0.w1.weight 14336x7168 m
model.layers.#.post_attention_layernorm.weight 7168 v
model.norm.weight 7168 v
lm_head.weight 129280x7168 h
"""

TREES = {
  name.lower(): text
  for name, text in list(globals().items())
  if name.isupper() and isinstance(text, str)
}


def _leaves(text, rename, deepen):
  names, shapes, labels = [], [], []
  for line in text.strip().splitlines():
    name, sizes, label = line.split()
    shape = tuple(int(size) for size in sizes.split("x"))
    for given in rename(name):
      names.append(given)
      shapes.append(deepen(name, shape))
      labels.append(LABELS[label])
  return names, shapes, labels


def per_layer(text: str):
  """Names, shapes and labels of a tree with two layers of each kind."""

  def rename(name):
    return [name.replace("#", i) for i in "01"] if "#" in name else [name]

  return _leaves(text, rename, lambda name, shape: shape)


def stacked(text: str, depth: int):
  """The same where each layer's leaves are stacked along their first axis."""

  def rename(name):
    for index in ("/#", ".#", "_#"):
      name = name.replace(index, "")
    return [name]

  def deepen(name, shape):
    return (depth, *shape) if "#" in name else shape

  return _leaves(text, rename, deepen)
