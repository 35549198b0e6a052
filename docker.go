package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// env returns a variable of the docker command. Files from Windows have a carriage return after it.
func env(name string) string { return strings.TrimSpace(os.Getenv(name)) }

// dockerContext returns the name of the docker command's context and the engine's address in it,
// without a user; "" if there is none, or it is not known. DOCKER_HOST has precedence over the
// current context, and DOCKER_CONTEXT, by its documentation, over both.
// https://docs.docker.com/engine/manage-resources/contexts/
func dockerContext() (name, endpoint string) {
	home, _ := os.UserHomeDir()
	dir := cmp.Or(env("DOCKER_CONFIG"), filepath.Join(home, ".docker"))
	read := func(into any, path ...string) {
		if text, err := readText(filepath.Join(append([]string{dir}, path...)...)); err == nil {
			_ = json.Unmarshal([]byte(text), into)
		}
	}
	if name = env("DOCKER_CONTEXT"); name == "" && env("DOCKER_HOST") == "" {
		var config struct{ CurrentContext string }
		read(&config, "config.json")
		name = config.CurrentContext
	}
	if name == "" || name == "default" {
		return "", ""
	}
	var meta struct {
		Endpoints struct{ Docker struct{ Host string } }
	}
	sum := sha256.Sum256([]byte(name))
	read(&meta, "contexts", "meta", hex.EncodeToString(sum[:]), "meta.json")
	u, err := url.Parse(meta.Endpoints.Docker.Host)
	if err != nil || u.Scheme == "" {
		return name, ""
	}
	return name, withoutUser(u)
}
