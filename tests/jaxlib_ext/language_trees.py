"""The parameters of public language models; see `model_trees`."""

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

# allenai/OLMo, olmo/model.py, untied.
OLMO = """
model.transformer.wte.weight 50304x4096 e
model.transformer.blocks.#.att_proj.weight 12288x4096 m
model.transformer.blocks.#.attn_out.weight 4096x4096 m
model.transformer.blocks.#.ff_proj.weight 22016x4096 m
model.transformer.blocks.#.ff_out.weight 4096x11008 m
model.transformer.blocks.#.attn_norm.weight 4096 v
model.transformer.ln_f.weight 4096 v
model.transformer.ff_out.weight 50304x4096 h
"""

# openai/gpt-oss, gpt_oss/torch/model.py.
GPT_OSS = """
embedding.weight 201088x2880 e
block.#.attn.sinks 64 v
block.#.attn.qkv.weight 5120x2880 m
block.#.attn.norm.scale 2880 v
block.#.mlp.gate.weight 128x2880 m
block.#.mlp.mlp1_weight 128x5760x2880 m
block.#.mlp.mlp1_bias 128x5760 v
block.#.mlp.mlp2_weight 128x2880x2880 m
norm.scale 2880 v
unembedding.weight 201088x2880 h
"""

# NVIDIA/Megatron-LM, core/models/gpt.
MEGATRON = """
embedding.word_embeddings.weight 50304x1024 e
embedding.position_embeddings.weight 1024x1024 e
decoder.layers.#.self_attention.linear_qkv.weight 3072x1024 m
decoder.layers.#.self_attention.linear_qkv.layer_norm_weight 1024 v
decoder.layers.#.self_attention.linear_proj.weight 1024x1024 m
decoder.layers.#.mlp.linear_fc1.weight 4096x1024 m
decoder.layers.#.mlp.linear_fc1.layer_norm_weight 1024 v
decoder.final_layernorm.weight 1024 v
output_layer.weight 50304x1024 h
"""

# young-geng/EasyLM, models/llama; its norms call their gains kernels.
EASYLM = """
params/transformer/wte/embedding 32000x4096 e
params/transformer/h/#/attention/wq/kernel 4096x4096 m
params/transformer/h/#/attention_norm/kernel 4096 v
params/transformer/h/#/ffn_norm/kernel 4096 v
params/transformer/h/#/feed_forward/w1/kernel 4096x11008 m
params/transformer/ln_f/kernel 4096 v
params/lm_head/kernel 4096x32000 h
"""

# A haiku transformer, as in google-deepmind/dm-haiku's examples.
HAIKU = """
transformer/~/embed/embeddings 50257x768 e
transformer/h#_attn/query/w 768x768 m
transformer/h#_attn/query/b 768 v
transformer/h#_attn/linear/w 768x768 m
transformer/h#_mlp/linear/w 768x3072 m
transformer/h#_mlp/linear_1/w 3072x768 m
transformer/layer_norm/scale 768 v
transformer/layer_norm/offset 768 v
transformer/linear/w 768x50257 h
transformer/linear/b 50257 v
"""

# apple/axlearn, whose layers are repeated by a scan.
AXLEARN = """
decoder/emb/token_emb/weight 32768x2048 e
transformer/repeat/layer/self_attention/norm/scale 12x2048 v
transformer/repeat/layer/feed_forward/linear1_0/weight 12x2048x5504 m
transformer/repeat/layer/feed_forward/linear2/weight 12x5504x2048 m
transformer/repeat/layer/feed_forward/linear2/bias 12x2048 v
decoder/output_norm/scale 2048 v
decoder/lm_head/weight 32768x2048 h
"""

# google-deepmind/recurrentgemma, jax/modules.py.
RECURRENTGEMMA = """
embedder/input_embedding 256000x2560 e
blocks/#/recurrent_block/rg_lru/a_param 2560 v
blocks/#/recurrent_block/rg_lru/input_gate/w 10x256x256 m
blocks/#/recurrent_block/rg_lru/input_gate/b 10x256 v
blocks/#/recurrent_block/conv_1d/w 4x2560 v
blocks/#/recurrent_block/conv_1d/b 2560 v
blocks/#/recurrent_block/linear_x/kernel 2560x2560 m
blocks/#/mlp_block/ffw_up/w 2x2560x7680 m
blocks/#/mlp_block/ffw_up/b 2x1x1x7680 v
blocks/#/channel_pre_norm/scale 2560 v
final_norm/scale 2560 v
"""

# BlinkDL/RWKV-LM, RWKV-v7.
RWKV7 = """
emb.weight 65536x768 e
blocks.#.att.x_r 1x1x768 v
blocks.#.att.w0 1x1x768 v
blocks.#.att.w1 768x64 m
blocks.#.att.w2 64x768 m
blocks.#.att.k_k 1x1x768 v
blocks.#.att.r_k 12x64 v
blocks.#.att.receptance.weight 768x768 m
blocks.#.ffn.x_k 1x1x768 v
head.weight 65536x768 h
"""

# stanford-crfm/levanter, models/gpt2.py: named arrays in equinox modules.
LEVANTER = """
embeddings.token_embeddings.weight.array 50257x768 e
embeddings.position_embeddings.weight.array 1024x768 e
transformer.blocks.stacked.ln_1.weight.array 12x768 v
transformer.blocks.stacked.ln_1.bias.array 12x768 v
transformer.blocks.stacked.attn.c_attn.weight.array 12x768x3x12x64 m
transformer.blocks.stacked.attn.c_attn.bias.array 12x3x12x64 v
transformer.blocks.stacked.mlp.c_fc.weight.array 12x768x3072 m
transformer.blocks.stacked.mlp.c_fc.bias.array 12x3072 v
transformer.ln_f.weight.array 768 v
lm_head.weight.array 50257x768 h
"""

# Hugging Face, modeling_electra.py.
ELECTRA = """
electra.embeddings.word_embeddings.weight 30522x128 e
electra.embeddings_project.weight 256x128 m
electra.encoder.layer.#.output.dense.weight 256x1024 m
generator_predictions.dense.weight 128x256 m
generator_lm_head.weight 30522x128 h
"""

# Hugging Face, modeling_roberta.py, RobertaForSequenceClassification.
ROBERTA_CLASSIFIER = """
roberta.embeddings.word_embeddings.weight 50265x768 e
roberta.encoder.layer.#.output.dense.weight 768x3072 m
classifier.dense.weight 768x768 m
classifier.out_proj.weight 2x768 h
"""
