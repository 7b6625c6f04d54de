# Adds the hooks to an OCI runtime specification on standard input:
#   ctr oci spec | jq -f hooks.jq > /etc/containerd/nydus-base-runtime-spec.json
# The hook itself gives up after 10 s and then takes up to 10 s to replace a daemon; the timeout here is the last resort.
# With another run_dir than the default, args are ["nydus-shim-hook", "-run-dir", DIR, $stage].
def hook($stage): {
  path: "/usr/local/bin/nydus-shim-hook",
  args: ["nydus-shim-hook", $stage],
  timeout: 30
};
.hooks.createRuntime += [hook("createRuntime")]
| .hooks.poststop += [hook("poststop")]
