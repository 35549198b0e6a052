package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// town is an engine whose containers come and go, and what it remembers of them.
type town struct {
	*small
	*collector
	t    *testing.T
	past *pastEvents
	log  *harness.Log
}

// newTown starts one, whose containers have their paths by these rules.
func newTown(t *testing.T, rules string) *town {
	t.Helper()
	s, c, log := newSmall(t, `[]`)
	c.containers.rules = mustRules(t, rules)
	town := &town{s, c, t, &pastEvents{}, log}
	handler := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/events" {
			town.past.ServeHTTP(w, r)
			return
		}
		handler.ServeHTTP(w, r)
	})
	return town
}

// has makes these the containers that run: each is an id and a name, and maybe more for the list.
func (town *town) has(containers ...string) {
	var list []string
	for i, text := range containers {
		id, name, _ := strings.Cut(text, " ")
		name, more, _ := strings.Cut(name, ",")
		entry := fmt.Sprintf(`{"Id":%q,"Names":["/%s"],"Created":%d`, id, name, i)
		if more != "" {
			entry += "," + more
		}
		list = append(list, entry+"}")
		town.container(id, smallInspect, smallStats)
	}
	town.answers["/containers/json"] = "[" + strings.Join(list, ",") + "]"
}

// happens makes that happen to a container, just now.
func (town *town) happens(id, name, action, attributes string) {
	town.past.add(id, action, fmt.Sprintf(`"name":%q`, name)+attributes, time.Now())
}

// ends ends a container with an exit code.
func (town *town) ends(id, name string, code int, attributes ...string) {
	town.happens(id, name, "die", fmt.Sprintf(`,"exitCode":"%d"`, code)+strings.Join(attributes, ""))
}

// polls polls, and holds the metrics to lines as wants does.
func (town *town) polls(why string, lines ...string) sweepResult {
	town.t.Helper()
	result := town.sweep(town.t.Context())
	wants(town.t, why, result, lines...)
	return result
}

// OOM kills and failed exits go on by path, whichever container has it, and begin with 0.
func TestEnds(t *testing.T) {
	town := newTown(t, "")
	town.ends("1", "web", 1) // before the daemon's start
	town.has("1 web", "8 db")
	town.polls("at first", "web.oom_kills 0", "web.failed_exits 0", "db.failed_exits 0")

	town.happens("1", "web", "oom", "")
	town.ends("1", "web", 137)
	town.has("2 web", "8 db")
	town.polls("made anew under its name", "web.oom_kills 1", "web.failed_exits 1", "db.oom_kills 0",
		"db.failed_exits 0")
	town.polls("then nothing", "web.oom_kills 1", "web.failed_exits 1")
	town.ends("2", "web", 0)
	town.ends("8", "db", 3)
	town.polls("restarted by its policy", "web.failed_exits 1", "db.failed_exits 1")

	town.ends("3", "job", 4)
	town.polls("one that nobody has seen", "!job.", "web.failed_exits 1")
	town.has("2 web", "4 job", "8 db")
	town.polls("now it is seen", "job.failed_exits 0", "job.oom_kills 0")
	town.has("2 web", "8 db")
	town.ends("4", "job", 3)
	town.polls("the last point", "job.failed_exits 1", "job.oom_kills 0", "!job.uptime", "!job.memory")
	town.polls("no more points", "!job.")
	town.ends("5", "job", 3)
	town.ends("6", "job", 0)
	town.happens("7", "job", "oom", "")
	town.ends("7", "job", 137)
	town.polls("lived between two polls, thrice", "job.failed_exits 3", "job.oom_kills 1")
	town.polls("no more points again", "!job.")
	town.has("2 web", "9 job", "8 db")
	town.polls("it is back", "job.failed_exits 3", "job.oom_kills 1", "web.failed_exits 1")
	town.has("2 web", "8 db")
	town.ends("9", "job", 0)
	town.polls("it ends well", "!job.")
	for _, its := range town.containers.ends {
		its.seen = its.seen.Add(-endsKept - time.Second)
	}
	town.ends("10", "job", 1)
	town.polls("a day later", "!job.", "web.failed_exits 1")
	if _, kept := town.containers.ends["job"]; kept || len(town.containers.ends) != 2 {
		t.Errorf("it keeps %d", len(town.containers.ends))
	}
	if got := town.log.Take(); strings.Count(got, "\n") != 1 {
		t.Errorf("it logged %s", got)
	}
}

// What happens to a container without a path of its own counts for none.
func TestEndsOfThoseThatAreLeftOut(t *testing.T) {
	town := newTown(t, `[{"regexp":"^secret","drop":true},{"regexp":"^web-\\d$","into":"web"}]`)
	town.has("1 web-1", "2 web-2", "3 secret")
	first := town.polls("at first", "web.failed_exits 0", "!secret")
	if first.collisions != 1 {
		t.Errorf("%d collisions", first.collisions)
	}
	town.ends("2", "web-2", 1)
	town.ends("3", "secret", 1)
	town.ends("4", "secret-too", 1)
	town.ends("5", "web-3", 1) // it lived beside web-1
	town.polls("others", "web.failed_exits 0", "!secret")
	town.has("1 web-1")
	town.ends("2", "web-2", 1)
	town.polls("the one that was left out is gone", "web.failed_exits 0")
	town.has("1 web-1", "2 web-2")
	town.polls("it is back", "web.failed_exits 0")
	town.ends("1", "web-1", 1)
	town.has("2 web-2")
	town.polls("it takes over", "web.failed_exits 1")
	town.ends("2", "web-2", 1)
	town.polls("and is restarted", "web.failed_exits 2")
}

// Paths are those of the rules, be it by image, label, or the name of a task.
func TestEndsByRules(t *testing.T) {
	const labels = `"com.docker.compose.project":"shop","com.docker.compose.service":"web"`
	const compose = `{"regexp":"(.+)","from":"label:com.docker.compose.service",` +
		`"into":"${label:com.docker.compose.project}.$1"}`
	for why, test := range map[string]struct{ rule, entry, attributes, path string }{
		"labels": {compose, `"Labels":{` + labels + `}`, "," + labels, "shop.web"},
		"image": {`{"regexp":"^(\\w+):.*","from":"image","into":"of.$1"}`, `"Image":"redis:7"`,
			`,"image":"redis:7"`, "of.redis"},
		"a task": {`{"regexp":"^(\\w+)\\..*","into":"$1"}`, ``, ``, "task"},
		"none":   {``, ``, ``, "task"},
	} {
		of := func(n int) string {
			if why == "a task" { // each run has another name
				return fmt.Sprintf("task.%d.x%[1]d", n)
			}
			return "task"
		}
		town := newTown(t, test.rule)
		has := func(n int) { town.has(fmt.Sprintf("%d %s,%s", n, of(n), test.entry)) }
		has(1)
		town.polls(why, test.path+".failed_exits 0")
		town.ends("1", of(1), 1, test.attributes)
		has(2)
		town.polls(why+", made anew", test.path+".failed_exits 1")
		for n := range 3 {
			town.ends(fmt.Sprint(n+2), of(n+2), 1, test.attributes)
		}
		has(5)
		town.polls(why+", thrice between two polls", test.path+".failed_exits 4")
		town.has()
		town.ends("5", of(5), 1, test.attributes)
		town.polls(why+", gone", test.path+".failed_exits 5")
		town.ends("6", of(6), 1, test.attributes)
		town.polls(why+", there for a moment", test.path+".failed_exits 6")
		town.polls(why+", nothing", "!"+test.path)
	}
}

// While the host is not known, no path is made that would be another one with it.
func TestEndsOnAnUnknownHost(t *testing.T) {
	town := newTown(t, `{"regexp":"^app$","into":"${host}.web"}`)
	town.answers["/info"] = "<html>"
	town.has("1 web")
	town.polls("at first", "web.failed_exits 0")
	town.ends("2", "app", 1)
	town.polls("without a host", "web.failed_exits 0")
	town.answers["/info"] = `{"Name":"h"}`
	town.has("1 web", "3 app")
	town.about.askedAt = time.Time{}
	town.polls("with a host")
	town.polls("with a host", "web.failed_exits 0", "h.web.failed_exits 0")
	town.ends("3", "app", 1)
	town.polls("with a host", "web.failed_exits 0", "h.web.failed_exits 1")
}

// Where /events is refused there are none; after that they go on.
func TestEndsWithoutEvents(t *testing.T) {
	town := newTown(t, "")
	town.has("1 web")
	town.polls("at first", "web.failed_exits 0")
	town.ends("1", "web", 1)
	town.polls("one", "web.failed_exits 1")
	town.past.refused = true
	town.polls("refused", "!web.failed_exits", "!web.oom_kills", "!h.events.", "web.uptime 60")
	town.past.refused = false
	town.polls("well again", "web.failed_exits 1", "h.events.die 0")
	town.ends("1", "web", 2)
	town.polls("well again", "web.failed_exits 2", "h.events.die 1")
}

// A renamed container goes on under its new name, and one in a crash loop has little else.
func TestEndsOfOneThatIsRenamedOrLoops(t *testing.T) {
	town := newTown(t, "")
	town.has("1 web")
	town.polls("at first", "web.failed_exits 0")
	town.ends("1", "web", 1)
	town.polls("fails", "web.failed_exits 1")
	town.has("1 shop")
	town.polls("renamed", "!web.", "shop.failed_exits 0", "shop.uptime 60")
	town.ends("1", "shop", 1)
	town.answers["/containers/json"] = `[{"Id":"1","Names":[]}]` // it is renamed again
	town.polls("without a name", "!web.", "shop.failed_exits 1", "shop.uptime 60",
		"h.containers.total 1", "h.metrics.sampled 1")

	loops := `{"State":{"Running":true,"Restarting":true},"RestartCount":%d}`
	for n := range 3 {
		town.ends("1", "shop", 7)
		town.happens("1", "shop", "start", "")
		town.ends("1", "shop", 7)
		town.has(`1 shop,"State":"restarting"`)
		town.answers["/containers/1/json"] = fmt.Sprintf(loops, 2*n+2)
		town.polls("in a crash loop", fmt.Sprintf("shop.failed_exits %d", 2*n+3), "shop.oom_kills 0",
			fmt.Sprintf("shop.restarts %d", 2*n+2), "!shop.uptime", "!shop.memory", "h.metrics.failed 0",
			"h.metrics.sampled 1")
	}
	town.past.refused = true
	town.polls("without events", "shop.restarts 6", "!shop.failed_exits", "!shop.uptime")
}
