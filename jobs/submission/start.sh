# Starts the driver of a submitted job by the interpreter with which Ray starts its workers: `python` on PATH may be
# another, or none. The raylet has it in its command line, and Ray puts the raylet's number into RAY_RAYLET_PID.
python=$(tr '\0' '\n' 2>/dev/null <"/proc/$RAY_RAYLET_PID/cmdline" |
    sed -n -e 's/^--python_worker_command="\([^"]*\)".*/\1/p' -e 's/^--python_worker_command=\([^" ]*\).*/\1/p')
if [ ! -x "$python" ]; then
    echo "error: Ray does not say by which Python it runs on $(uname -n) (RAY_RAYLET_PID is '$RAY_RAYLET_PID')" >&2
    exit 1
fi
exec "$python" -m latentmill "$@"
