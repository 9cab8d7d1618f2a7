"""Words that make no run: each is refused in a line that names what is wrong."""

import pytest

from normfree.spec.compose import compose_run

LABEL = "would have the wrong label: use variant=custom"
SKIPS = "allowed: stop, or skip:N"
FAKE = "variant=sm-fake-r model.fake_start_step=1 model.fake_gap_steps=1"
BAND = "train.objective=entropy_band train.entropy_weight=1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # A setting that nothing reads.
        ("variant=sm-r model.negative_slope=0.3", "read with model.activation=leaky_relu only: leave it out"),
        ("variant=sm-r train.decay_slopes=true", "read with model.learnable_slope=per_layer or shared only"),
        ("variant=leaky-per-layer train.decay_slopes=-1", r"; train\.decay_slopes=-1: it should be greater than 0"),
        ("variant=sm-dyt-g model.norm_epsilon=0.1", "is read with a norm that divides only"),
        ("variant=sm-rms-g model.norm_steepness=0.5", "is read with model.norm=dyt or derf only"),
        ("variant=sm-ln-g model.taper_end_step=5", "is read with model.norm=taper only"),
        ("variant=sm-peri-g", "model.placement=peri is read with a norm only"),
        ("variant=sm-ln-g model.post_share=0.3", "is read with model.placement=mix only"),
        ("variant=sm-g model.linear_groups=[q]", "is read with model.linear=weight_norm or spectral_norm only"),
        ("model.rotary_share=0.5", "model.rotary_share=0.5 is read with model.position=rotary only"),
        ("preset=cpu model.patch_size=7", "model.patch_size=7 is read with model.family=vision only"),
        ("train.entropy_weight=1", "is not read with train.objective=next_token"),
        # A variant that is none, or whose label says something else.
        ("variant=sm-g-ln", "parts have an order: give variant=sm-ln-g"),
        ("variant=sm-ln-rms-g", "ln and rms both set model.norm; leave one out"),
        ("variant=sm-lnn-g", "unknown variant 'sm-lnn-g'; did you mean sm-ln-g"),
        ("variant=sm-ln-g model.final_norm=none", LABEL),
        ("variant=sm-rg model.num_hidden_layers=x", "num_hidden_layers='x'"),
        ("variant=sm-rg model.num_hidden_layers=4 model.activation=[relu,gelu,gelu,gelu]", "the wrong label"),
        # Training.
        ("train.compile=fast", r"train\.compile='fast': it should be False, True or 'cuda_graph'"),
        *((f"train.on_nonfinite={policy}", SKIPS) for policy in ("skip", "skip:0", "skip:-1", "skip:x", "''")),
        ("train.objective=entropy_band", "needs train.entropy_weight"),
        ("train.objective=token_type train.sharding=fsdp", "objective=token_type does not work with sharding=fsdp"),
        (f"train.objective=token_type {FAKE}", "objective=token_type does not work with norm=fake"),
        # Images.
        ("preset=fashion-vit data=files data.paths=[x]", "data=files is not read with model.family=vision: give data="),
        ("preset=fashion-vit data=images", "data=images needs data.paths"),
        ("preset=fashion-vit data.tokenizer=gpt2", "data.tokenizer is not read with data=fashion_mnist"),
        ("preset=fashion-vit data=images data.paths=[x] data.validation_split=test", "give data=hub or data=hub_image"),
        ("data.column=text", "data.column is not read with data=installed"),
        ("variant=sm-dyt-g train.sigma_weight=1", "=1.0 is read with model.final_norm=layernorm, lns or fake only"),
        ("preset=fashion-vit data.context=49", "data.context=49, but an image of this model has 50 tokens"),
        ("preset=fashion-vit train.objective=token_type", "=token_type is for model.family=decoder, not vision"),
        ("preset=fashion-vit model.position=rotary", "position='rotary' is for family='decoder'"),
        # Sources and targets.
        (f"preset=denoise {BAND}", "entropy_band is for model.family=decoder or vision"),
        ("preset=denoise train.sigma_weight=1", "sigma_weight=1.0 does not work with model.family=encoder_decoder"),
        ("preset=cpu data.packing=docstring", "is for model.family=encoder_decoder"),
        ("preset=denoise data.packing=docstring data.context=7", "needs data.context of 8 or more, got 7"),
        ("preset=denoise data.packing=docstring model.span_seed=1", "model.span_seed=1 is read with masked spans"),
        ("preset=denoise model.target_tokens=4", "is read with data.packing=docstring, which sets it, only"),
    ],
)
def test_words_that_make_no_run_are_refused(words, message):
    with pytest.raises(ValueError, match=message) as refused:
        compose_run(words.split())
    assert "\n" not in str(refused.value)
