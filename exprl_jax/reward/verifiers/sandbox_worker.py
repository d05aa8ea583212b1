"""The process that runs one program: started by `sandbox`, by its text, in an interpreter without site-packages.

Arguments: `keep` where this process must itself find and end what the program leaves behind (nothing else does, without
namespaces); the user to become ("" for none); bytes of memory, seconds of CPU and number of processes; the descriptor
that holds the program; the folder of libraries ("" for none); what to do, and with what:

    script                       run the program, which reads stdin and writes stdout
    call FUNCTION                call its function: JSON arguments on stdin, the result as JSON on stdout
    serve REQUESTS REPLIES       let tests in another sandbox use it, over two descriptors (`assert_worker`)
    check REQUESTS REPLIES       be those tests

It knows nothing that a program must not learn: neither expected outputs nor the environment of the training run.  The
exit status is zero where the program ended by itself without an exception; `sys.exit` with any value is no exception.
"""

import builtins
import os
import resource
import signal
import sys

# The one folder that a program may write to, and the devices that it may use.  /dev/zero could be mapped as memory that
# no limit counts.
SCRATCH = "/program"
SCRATCH_BYTES = 16 << 20
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
# Small, because files in memory are counted nowhere else.
_FILE_BYTES = 1 << 20
# Few, because of what the kernel keeps for a socket or a pipe.
_OPEN_FILES = 32
_SIGNALS = 1024
_STACK_BYTES = 64 << 20
_RECURSION = 50_000

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38

# Sites that judge Python import these for the program, and the programs count on it.  Only those that it mentions are
# imported; where a module and a function share a name it is the module's, as in LiveCodeBench.
PRELUDE = {
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Generic Iterable Iterator List Mapping "
    "NamedTuple Optional Sequence Set Tuple Type TypeVar Union",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "heapq": "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest",
    "bisect": "bisect_left bisect_right insort insort_left insort_right",
    "math": "acos asin atan atan2 ceil comb cos dist e exp fabs factorial floor fmod gcd hypot inf isclose isnan isqrt "
    "lcm log log10 log2 nan perm pi prod sin sqrt tan tau trunc",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle groupby islice pairwise "
    "permutations product repeat starmap takewhile zip_longest",
    "functools": "cache cached_property cmp_to_key lru_cache partial reduce total_ordering wraps",
    "operator": "add and_ attrgetter floordiv itemgetter mul or_ sub truediv xor",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits punctuation",
    "copy": "deepcopy",
    "random": "choice randint shuffle",
    "statistics": "mean median mode",
    "datetime": "date timedelta",
    "dataclasses": "dataclass",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "io": "BytesIO StringIO",
    "sys": "setrecursionlimit stdin stdout",
}
_MODULES = (*PRELUDE, "json", "os", "queue", "re", "threading", "time")


def _names(code):
    """Every name that a code object, or one inside it, mentions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= _names(constant)
    return names


def offer_prelude(names, namespace):
    """Adds those of the usual names that are among `names`."""
    for module in _MODULES:
        if module in names:
            namespace[module] = __import__(module)
    for module, exported in PRELUDE.items():
        for name in names.intersection(exported.split()):
            namespace[name] = getattr(__import__(module), name)


def _module(name):
    module = sys.modules[name] = type(sys)(name)
    return module


def _execute(program, module):
    sys.argv = ["program.py"]
    code = compile(program, "program.py", "exec", dont_inherit=True)
    offer_prelude(_names(code), module.__dict__)
    exec(code, module.__dict__)


def _define(*programs):
    """A module of what programs define, for others to call; one that then exits has defined it all the same."""
    module, own, leave = _module("solution"), os.getpid(), os._exit

    def leave_definitions(status):
        if os.getpid() != own:
            leave(status)
        raise SystemExit

    os._exit = leave_definitions
    for program in programs:
        try:
            _execute(program, module)
        except SystemExit:
            pass
    if os.getpid() != own:
        leave(0)
    os._exit = leave
    return module


def find(module, name):
    """A method of the program's class `Solution`, or whatever else it has of that name.

    Raises:
      AttributeError: it has nothing of that name.
    """
    owner = getattr(module, "Solution", None)
    return getattr(owner(), name) if hasattr(owner, name) else getattr(module, name)


def _silence():
    """Puts nothing in the place of stdin and stdout, so that no print is taken for a result; returns what was there."""
    kept = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return kept


def _call(program, function):
    import json

    given, results = _silence()
    with os.fdopen(given, "rb") as file:
        arguments = json.load(file)
    # NumPy's arrays and numbers know how to become plain ones.
    result = json.dumps(find(_define(program), function)(*arguments), default=lambda value: value.tolist())
    with os.fdopen(results, "w", encoding="ascii") as file:
        file.write(result)
    # Its threads may be waiting for what never comes.
    os._exit(0)


def _limit(memory_bytes, cpu_s, processes):
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_SIGPENDING: _SIGNALS,
        resource.RLIMIT_STACK: _STACK_BYTES,
    }
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def _become(user):
    """Gives up root, and with it all powers, for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _kill_descendants():
    """Orphans become this process's children, so that none is left when there are no more children."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            children = [int(pid) for pid in file.read().split()]
        if not children:
            return
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


def _keep():
    """Forks; returns in the child, which may run the program; the parent ends with it and all that it left behind."""
    import ctypes

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    settings = ((_PR_SET_PDEATHSIG, signal.SIGTERM), (_PR_SET_CHILD_SUBREAPER, 1), (_PR_SET_NO_NEW_PRIVS, 1))
    for option, value in settings:
        if prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl {option}")
    child = os.fork()
    if child:

        def stop(number, frame):
            _kill_descendants()
            os._exit(1)

        signal.signal(signal.SIGTERM, stop)
        status = os.waitpid(child, 0)[1]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_descendants()
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main():
    """Confines this process as the arguments say, and runs the program."""
    keep, user, memory_bytes, cpu_s, processes, program_fd, libraries, task, *parameters = sys.argv[1:]
    with open(int(program_fd), "rb") as file:
        program = file.read()
    if keep:
        _keep()
    if user:
        _become(int(user))
    _limit(int(memory_bytes), int(cpu_s), int(processes))
    if libraries:
        sys.path.append(libraries)
    sys.setrecursionlimit(_RECURSION)
    # Answers may be long numbers.
    sys.set_int_max_str_digits(0)
    builtins.exit = builtins.quit = sys.exit
    if task == "script":
        try:
            _execute(program, _module("__main__"))
        except SystemExit:
            return
    elif task == "call":
        _call(program, *parameters)
    else:
        import assert_worker

        _silence()
        channel = assert_worker.Channel(*map(int, parameters))
        if task == "serve":
            assert_worker.serve(channel, program, _define, find)
        else:
            assert_worker.check(channel, program, offer_prelude)


if __name__ == "__main__":
    main()
