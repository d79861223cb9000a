# Starts the driver of a submitted job by the interpreter with which Ray starts its workers: `python` on PATH may be
# another, or none. Ray's raylet, from which this process descends, has it in its command line.
python= pid=$PPID
while [ "${pid:-0}" -gt 1 ] && [ -z "$python" ]; do
    python=$(tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" |
        sed -n -e 's/^--python_worker_command="\([^"]*\)".*/\1/p' -e 's/^--python_worker_command=\([^" ][^ ]*\).*/\1/p')
    pid=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$pid/status")
done
if [ ! -x "$python" ]; then
    echo "error: no raylet on $(uname -n) says by which Python Ray runs here; start this driver as a job of Ray's" >&2
    exit 1
fi
exec "$python" -m latentmill "$@"
