"""The parameters of public models of images and sound; see `model_trees`."""

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

# google/flax, examples/mnist.
FLAX_MNIST = """
Conv_0/kernel 3x3x1x32 m
Conv_1/kernel 3x3x32x64 m
Dense_0/kernel 3136x256 m
Dense_0/bias 256 v
Dense_1/kernel 256x10 h
Dense_1/bias 10 v
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

# torchvision, models/vgg.py.
TORCHVISION_VGG = """
features.0.weight 64x3x3x3 m
features.2.weight 64x64x3x3 m
classifier.0.weight 4096x25088 m
classifier.3.weight 4096x4096 m
classifier.6.weight 1000x4096 h
classifier.6.bias 1000 v
"""

# torchvision, models/vision_transformer.py.
TORCHVISION_VIT = """
class_token 1x1x768 v
conv_proj.weight 768x3x16x16 m
encoder.pos_embedding 1x197x768 e
encoder.layers.encoder_layer_#.ln_1.weight 768 v
encoder.layers.encoder_layer_#.self_attention.in_proj_weight 2304x768 m
encoder.layers.encoder_layer_#.self_attention.in_proj_bias 2304 v
encoder.layers.encoder_layer_#.mlp.0.weight 3072x768 m
encoder.layers.encoder_layer_#.mlp.3.weight 768x3072 m
encoder.ln.weight 768 v
heads.head.weight 1000x768 h
"""

# facebookresearch/dinov2, models/vision_transformer.py and dino_head.py.
DINOV2 = """
cls_token 1x1x768 v
register_tokens 1x4x768 v
mask_token 1x768 v
pos_embed 1x1370x768 e
patch_embed.proj.weight 768x3x14x14 m
blocks.#.ls1.gamma 768 v
blocks.#.mlp.w12.weight 4096x768 m
head.mlp.0.weight 2048x768 m
head.mlp.2.weight 2048x2048 m
head.mlp.4.weight 256x2048 m
head.last_layer.weight 65536x256 h
"""

# google-research/big_vision, models/proj/image_text/two_towers.py; the
# blocks of the image tower without "img/Transformer".
SIGLIP = """
img/embedding/kernel 16x16x3x768 m
img/pos_embedding 1x196x768 e
encoderblock_#/LayerNorm_0/scale 768 v
encoderblock_#/MultiHeadDotProductAttention_0/query/kernel 768x12x64 m
encoderblock_#/MultiHeadDotProductAttention_0/query/bias 12x64 v
encoderblock_#/MlpBlock_0/Dense_0/kernel 768x3072 m
img/MAPHead_0/probe 1x1x768 v
img/MAPHead_0/MlpBlock_0/Dense_0/kernel 768x3072 m
img/MAPHead_0/MultiHeadDotProductAttention_0/key/kernel 768x12x64 m
txt/Embed_0/embedding 32000x768 e
txt/pos_embedding 1x64x768 e
txt/Encoder_0/encoderblock_#/LayerNorm_0/scale 768 v
txt/head/kernel 768x768 h
txt/head/bias 768 v
t 1 v
b 1 v
"""

# black-forest-labs/flux, model.py.
FLUX_OWN = """
img_in.weight 3072x64 m
time_in.in_layer.weight 3072x256 m
time_in.out_layer.weight 3072x3072 m
vector_in.in_layer.weight 3072x768 m
txt_in.weight 3072x4096 m
double_blocks.#.img_mod.lin.weight 18432x3072 m
double_blocks.#.img_attn.norm.query_norm.scale 128 v
double_blocks.#.img_attn.qkv.weight 9216x3072 m
double_blocks.#.img_mlp.0.weight 12288x3072 m
single_blocks.#.linear1.weight 21504x3072 m
single_blocks.#.modulation.lin.weight 9216x3072 m
final_layer.linear.weight 64x3072 h
final_layer.adaLN_modulation.1.weight 6144x3072 m
"""

# Hugging Face diffusers, unet_2d_condition.py.
DIFFUSERS_UNET = """
conv_in.weight 320x4x3x3 m
time_embedding.linear_1.weight 1280x320 m
time_embedding.linear_2.weight 1280x1280 m
add_embedding.linear_1.weight 1280x2816 m
down_blocks.0.resnets.0.time_emb_proj.weight 320x1280 m
down_blocks.0.resnets.0.conv1.weight 320x320x3x3 m
down_blocks.0.attentions.0.proj_in.weight 320x320 m
down_blocks.0.attentions.0.proj_out.weight 320x320 m
conv_norm_out.weight 320 v
conv_out.weight 4x320x3x3 m
"""

# timm, models/swin_transformer.py.
TIMM_SWIN = """
patch_embed.proj.weight 96x3x4x4 m
layers.0.blocks.#.attn.relative_position_bias_table 169x3 v
layers.0.blocks.#.attn.qkv.weight 288x96 m
layers.0.blocks.#.norm1.weight 96 v
layers.0.downsample.reduction.weight 192x384 m
head.fc.weight 1000x768 h
"""
