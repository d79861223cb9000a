#!/bin/sh
# One dataset by many machines without Ray: a Slurm array of eight tasks with a GPU each.
#
#   sbatch slurm-array.sh s3://BUCKET/prompts.parquet s3://BUCKET/birds
#   sbatch --array=3 slurm-array.sh s3://BUCKET/prompts.parquet s3://BUCKET/birds      # one of them again: it resumes
#
# Each task makes every eighth chunk. None waits for another: whichever finds the whole dataset committed publishes it.
# Replace: partition, account and limits of your site, the model. The output may be a bucket or a shared file system.
#SBATCH --job-name=latentmill
#SBATCH --array=1-8
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=24G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
SHARDS=8    # as in --array; SLURM_ARRAY_TASK_COUNT is 1 where one task is sent again

srun latentmill run "$1" --out "$2" --model sd15 --device cuda --executor inline --shard "$SLURM_ARRAY_TASK_ID/$SHARDS"
code=$?
[ "$code" -eq 4 ] && exit 0    # this shard is done and others are at work: for Slurm that is success
exit "$code"
