# Start vLLM on the node of a Slurm job, and wait until it answers. A job sources this file before its tasks, if a section
# of the config has `node_script: configs/slurm/start_vllm.sh`. The server ends together with the job.
#
# MODEL must be the `model` of the config, and PORT that of its `base_url`. Submit with `--sbatch exclusive`, because two
# servers on one node would need two ports.
MODEL="${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}"
PORT="${PORT:-8000}"

vllm serve "$MODEL" --host 127.0.0.1 --port "$PORT" > "vllm-${SLURM_JOB_ID}.log" 2>&1 &
SERVER=$!
trap 'kill "$SERVER" 2> /dev/null' EXIT
until curl --silent --fail --output /dev/null "http://127.0.0.1:$PORT/v1/models"; do
    if ! kill -0 "$SERVER" 2> /dev/null; then
        echo "vLLM has ended. Its output is in $PWD/vllm-${SLURM_JOB_ID}.log" >&2
        exit 1
    fi
    sleep 5
done
