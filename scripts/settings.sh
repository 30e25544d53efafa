# Sourced by train.sh, generate.sh and evaluate.sh: the paper's settings by name, or the demo's where DEMO=1. sd15, sd35 and flux remove
# nudity; multi (SD v1.5) nudity, violence and illegal activity; vangogh (SD v1.4) a style. These variables change a setting:
# MODEL, DEVICE, EPOCHS, SETS, LIMIT (rows of a set), OUT, Q16_PROMPTS, STYLE_CLASSIFIER. PRINT=1 prints the commands.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
show_help "$@"
NAME=${1:-sd15}
DEVICE=${DEVICE:-cuda:0}
METHODS=${METHODS:-none des}
CONCEPT=nudity
ALPHA=(--concept_guidance_scale 200)
RATE=1e-05
[ "${DEMO:-}" = 1 ] && EPOCHS=${EPOCHS:-20}
EPOCHS=${EPOCHS:-2}
UNSAFE=datasets/unsafe_prompts_copro_sexual.csv
SAFE=datasets/safe_prompts_copro_sexual.csv
CONCEPT_SETS=${SETS:-sneaky_prompts mma_prompts ringabell_prompts p4d_prompts i2p_sexual_prompts}
BENIGN=coco_prompts
SAMPLING=()
COUNTED=(tasks/img_batch_classify.py --job nudity)
FID=(--variant paper)
CLIP=()
REFERENCE=datasets/coco_images

case "$NAME" in # encoders that are trained, and pairs a step for each
sd15)
    MODEL=${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}
    ENCODERS=(1)
    BATCHES=(128)
    ;;
sd35)
    MODEL=${MODEL:-stabilityai/stable-diffusion-3.5-medium}
    ENCODERS=(1 2 3)
    BATCHES=(128 128 4)
    ;;
flux)
    MODEL=${MODEL:-black-forest-labs/FLUX.1-dev}
    ENCODERS=(1 2)
    BATCHES=(16 4)
    ;;
multi) # the paper: one prompt that lists the three words, and further CoPro pairs; its separator is not published
    MODEL=${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}
    ENCODERS=(1)
    BATCHES=(128)
    CONCEPT="nudity, violence, illegal"
    UNSAFE=datasets/multi_unsafe.csv
    SAFE=datasets/multi_safe.csv
    CONCEPT_SETS=${SETS:-i2p_violence_prompts i2p_illegal_prompts i2p_sexual_prompts ringabell_violence_prompts}
    COUNTED=(tasks/img_batch_classify_q16.py --prompts_file "${Q16_PROMPTS:-prompts.pt}")
    ;;
vangogh)
    MODEL=${MODEL:-CompVis/stable-diffusion-v1-4}
    ENCODERS=(1)
    BATCHES=(128)
    CONCEPT="Van Gogh"
    UNSAFE=datasets/vangogh_unsafe.csv
    SAFE=datasets/vangogh_safe.csv
    CONCEPT_SETS=${SETS:-vangogh_test}
    COUNTED=(tasks/img_batch_classify.py --job style --cls_class vincent-van-gogh --classifier "${STYLE_CLASSIFIER:-style_classifier}")
    ;;
*) fail "$NAME is none of sd15, sd35, flux, multi, vangogh" ;;
esac

if [ "${DEMO:-}" = 1 ]; then
    NAME=demo
    MODEL=demo/models/pipeline
    DEVICE=cpu
    ENCODERS=(1)
    BATCHES=(128)
    CONCEPT=mushroom
    ALPHA=(--concept_guidance_ratio 0.3)
    RATE=0.002
    UNSAFE=datasets/demo_unsafe_train.csv
    SAFE=datasets/demo_safe_train.csv
    CONCEPT_SETS=${SETS:-demo_plain demo_synonyms demo_indirect}
    BENIGN=demo_benign
    LIMIT=${LIMIT:-22}
    SAMPLING=(--num_inference_steps 20 --guidance_scale 3)
    COUNTED=(tasks/img_batch_classify.py --job object --classifier demo/models/classifier_object --cls_class "$CONCEPT")
    FID=(--feature_extractor demo/models/classifier_object)
    CLIP=(--clip_model demo/models/clip)
    REFERENCE=
    export HF_HUB_OFFLINE=1
fi

OUT=${OUT:-results/$NAME}
END=(${LIMIT:+--end_idx "$LIMIT"})
[ "${PRINT:-}" = 1 ] || use_environment requirements.txt

run() {
    if [ "${PRINT:-}" = 1 ]; then
        printf '%q ' "$@"
        echo
    else
        echo "== $*" >&2
        "$@"
    fi
}

# fetch NAME...: have prompt lists in datasets/; the demo's are in the repository
fetch() {
    local name
    for name in "$@"; do
        [ "$NAME" = demo ] || [ -f "datasets/$name.csv" ] || run python datasets/download.py "$name"
    done
}

# join OUT CSV...: one list of several
join() {
    run python -c 'import sys; import pandas as pd; from pathlib import Path; from des.data.prompts import read_rows
pd.concat([read_rows(Path(path))[["prompt"]] for path in sys.argv[2:]]).to_csv(sys.argv[1], index=False)' "$@"
}

# training_lists: have the lists that DES is trained on
training_lists() {
    case "$NAME" in
    multi)
        fetch safe_prompts_copro_sexual unsafe_prompts_copro_sexual
        local name
        for name in copro_violence copro_illegal; do
            [ -f "datasets/${name}_unsafe.csv" ] || run python datasets/download.py "$name"
        done
        for name in safe unsafe; do
            join "datasets/multi_$name.csv" "datasets/${name}_prompts_copro_sexual.csv" "datasets/copro_violence_$name.csv" "datasets/copro_illegal_$name.csv"
        done
        ;;
    vangogh)
        fetch safe_prompts_copro_sexual
        [ -f "$UNSAFE" ] || run python datasets/style_prompts.py "Vincent van Gogh" --name vangogh --test 0 --contents datasets/safe_prompts_copro_sexual.csv
        ;;
    *) fetch "$(basename "$SAFE" .csv)" "$(basename "$UNSAFE" .csv)" ;;
    esac
}

# encoder_folder I: where train.sh leaves the checkpoints of encoder I
encoder_folder() {
    local prefix=
    [ "${#ENCODERS[@]}" -gt 1 ] && prefix="encoder${1}_"
    echo "$OUT/checkpoints/${prefix}${RATE}_0.3"
}
