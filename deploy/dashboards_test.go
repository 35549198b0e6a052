package deploy_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// dashboards says for each file of queries how their paths begin, and what docs/metrics.md writes
// for that; the longer ones first.
var dashboards = map[string][][2]string{
	"deploy/grafana.json": {
		{"$prefix.$host.**.", "<c>."}, {"$prefix.$host.", "<h>."}, {"$prefix.$container.",
			"<c>."}, {"$prefix.**.", "<c>."},
	},
	"deploy/graphite-dashboard.json": {{"docker.**.", "<c>."}, {"docker.*.", "<h>."}},
}

// graphiteFunctions are those of Graphite 1.1 that dashboards and alerts use. That it has them,
// script/pictures shows.
var graphiteFunctions = []string{
	"alias", "aliasByNode", "aliasSub", "asPercent", "consolidateBy", "fallbackSeries",
	"highestAverage", "lowestAverage", "lowestCurrent",
	"nonNegativeDerivative", "perSecond", "scale", "transformNull",
}

// labels says what may be written on an axis where a unit is, by Grafana's names of units or in
// Graphite's vtitle.
var labels = map[string][]string{
	"":                 {"short", "none", "", "1 healthy, 0 unhealthy", "since the point before"},
	"/s":               {"pps", "cps", "a second", "packets a second"},
	"%":                {"percent", "%", "100 is one full CPU"},
	"s":                {"s"},
	"ns":               {"ns"},
	"ns × 0.000000001": {"s"},
	"CPUs × 100":       {"percent"},
	"ns/s × 0.0000001": {"percent", "threads' time, 100 is one CPU's"},
	"bytes":            {"bytes"},
	"bytes/s":          {"Bps", "bytes a second"},
	"bytes/s × 8":      {"bps", "bits a second"},
}

// contract is what docs/metrics.md says of a metric.
type contract struct{ kind, unit string }

// contracts returns that of every documented metric.
func contracts(t *testing.T) map[string]contract {
	t.Helper()
	all := map[string]contract{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(<[ch]>[^`]+)` \\| (counter|gauge)(?:, "+
		"([^|]+))? \\|").FindAllStringSubmatch(harness.ReadFile(t, "docs/metrics.md"), -1) {
		for _, name := range harness.Expand(row[1]) {
			all[name] = contract{row[2], row[3]}
		}
	}
	if len(all) < 60 {
		t.Fatalf("only %d metrics found in docs/metrics.md", len(all))
	}
	return all
}

// expression is a part of a Graphite query: the call of a function, the path of metrics, or a
// number or text.
type expression struct {
	function string
	args     []expression
	path     string
	literal  string
}

// parseQuery reads a Graphite query.
func parseQuery(query string) (expression, error) {
	e, rest, err := parseExpression(query)
	if err == nil && rest != "" {
		err = fmt.Errorf("%q is left over", rest)
	}
	return e, err
}

var (
	graphiteText = regexp.MustCompile(`^'([^']*)'`)
	graphiteWord = regexp.MustCompile(`^(?:[\w.$*-]|\{[\w,]+\})+`)
)

func parseExpression(text string) (e expression, rest string, err error) {
	text = strings.TrimLeft(text, " ")
	if m := graphiteText.FindStringSubmatch(text); m != nil {
		return expression{literal: m[1]}, text[len(m[0]):], nil
	}
	word := graphiteWord.FindString(text)
	rest = text[len(word):]
	_, notNumber := strconv.ParseFloat(word, 64)
	switch {
	case word == "":
		return e, "", fmt.Errorf("%q is no expression", text)
	case notNumber == nil:
		return expression{literal: word}, rest, nil
	case !strings.HasPrefix(rest, "("):
		return expression{path: word}, rest, nil
	}
	e.function = word
	for more := true; more; {
		var arg expression
		if arg, rest, err = parseExpression(rest[1:]); err != nil {
			return e, "", err
		}
		e.args = append(e.args, arg)
		if more = strings.HasPrefix(rest, ","); !more && !strings.HasPrefix(rest, ")") {
			return e, "", fmt.Errorf("%q is where , or ) should be", rest)
		}
	}
	return e, rest[1:], nil
}

// paths returns all paths in e.
func (e expression) paths() []string {
	if e.path != "" {
		return []string{e.path}
	}
	var all []string
	for _, arg := range e.args {
		all = append(all, arg.paths()...)
	}
	return all
}

// queryCheck holds queries to the contract, and remembers what it has seen.
type queryCheck struct {
	begins    [][2]string
	metrics   map[string]contract
	used      map[string]bool // metrics
	functions map[string]bool
}

// names returns the metrics of a path, as docs/metrics.md has them.
func (q *queryCheck) names(path string) ([]string, error) {
	for _, begin := range q.begins {
		if rest, ok := strings.CutPrefix(path, begin[0]); ok {
			names := harness.Expand(begin[1] + rest)
			for _, name := range names {
				if _, ok := q.metrics[name]; !ok {
					return nil, fmt.Errorf("%s: docs/metrics.md has no %s", path, name)
				}
			}
			return names, nil
		}
	}
	return nil, fmt.Errorf("%s begins with neither a host nor a container", path)
}

// unit checks e, which the function within is applied to, and returns the unit of what comes out.
func (q *queryCheck) unit(e expression, within string) (string, error) {
	if e.literal != "" {
		return "", fmt.Errorf("%q where metrics should be", e.literal)
	}
	isRate := func(function string) bool {
		return function == "perSecond" ||
			function == "nonNegativeDerivative"
	}
	if e.path != "" {
		names, err := q.names(e.path)
		if err != nil {
			return "", err
		}
		for _, name := range names {
			q.used[name] = true
			if m := q.metrics[name]; m != q.metrics[names[0]] {
				return "", fmt.Errorf("%s: %s is a %s, %s, and %s another", e.path, name, m.kind, m.unit,
					names[0])
			}
		}
		if isCounter := q.metrics[names[0]].kind == "counter"; isCounter != isRate(within) {
			return "", fmt.Errorf("%s is a %s, and goes into %q", e.path, q.metrics[names[0]].kind, within)
		}
		return q.metrics[names[0]].unit, nil
	}
	if !slices.Contains(graphiteFunctions, e.function) {
		return "", fmt.Errorf("%s is none of the functions we use", e.function)
	}
	q.functions[e.function] = true
	if isRate(e.function) && e.args[0].path == "" {
		// of a sum, it would take a restart for a negative rate
		return "", fmt.Errorf("%s of something other than metrics", e.function)
	}
	unit, err := q.unit(e.args[0], e.function)
	if err != nil {
		return "", err
	}
	for _, arg := range e.args[1:] {
		if arg.literal != "" {
			continue
		}
		if other, err := q.unit(arg, e.function); err != nil || other != unit {
			return "", fmt.Errorf("%s of %q and %q: %w", e.function, unit, other, err)
		}
	}
	switch e.function {
	case "perSecond":
		unit += "/s"
	case "scale":
		unit += " × " + e.args[1].literal
	case "asPercent":
		unit = "%"
	}
	return unit, nil
}

// readJSON reads a file into what into points to. What the type has no field for is not looked at.
func readJSON(t *testing.T, file string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(harness.ReadFile(t, file)), into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

type grafanaPanel struct {
	ID         int
	Type       string
	Title      string
	Datasource struct{ Type, UID string }
	GridPos    struct{ X, Y, W, H int }
	Panels     []any
	Targets    []struct {
		RefID, Target string
		Datasource    struct{ Type, UID string }
	}
	FieldConfig struct{ Defaults struct{ Unit string } }
}

type grafanaDashboard struct {
	SchemaVersion int
	Templating    struct {
		List []struct {
			Type, Name, Regex string
			Query             string
		}
	}
	Panels []grafanaPanel
}

type graphiteGraph struct {
	id     string
	params struct {
		Title, Vtitle string
		Target        []string
	}
}

// UnmarshalJSON reads a graph as Graphite has it: a list of its targets as they are in a URL, its
// parameters, and a URL that is not used.
func (g *graphiteGraph) UnmarshalJSON(text []byte) error {
	return json.Unmarshal(text, &[]any{&g.id, &g.params, new(string)})
}

// targets returns all queries, wherever in a file they are.
func targets(part any) []string {
	var all []string
	switch part := part.(type) {
	case string:
		return []string{part}
	case []any:
		for _, inner := range part {
			if _, isText := inner.(string); !isText {
				all = append(all, targets(inner)...)
			}
		}
	case map[string]any:
		for key, inner := range part {
			if list, isList := inner.([]any); isList && key == "target" {
				for _, query := range list {
					all = append(all, targets(query)...)
				}
			} else if _, isText := inner.(string); !isText || key == "target" {
				all = append(all, targets(inner)...)
			}
		}
	}
	return all
}

// labelled are queries, and what is written on the axis of their graph.
type labelled struct {
	title, label string
	queries      []string
}

func graphs(t *testing.T, file string) []labelled {
	var all []labelled
	if file == "deploy/grafana.json" {
		var d grafanaDashboard
		readJSON(t, file, &d)
		for _, p := range d.Panels {
			g := labelled{p.Title, p.FieldConfig.Defaults.Unit, nil}
			for _, target := range p.Targets {
				g.queries = append(g.queries, target.Target)
			}
			all = append(all, g)
		}
		return all
	}
	var d struct{ Graphs []graphiteGraph }
	readJSON(t, file, &d)
	for _, g := range d.Graphs {
		all = append(all, labelled{g.params.Title, g.params.Vtitle, g.params.Target})
	}
	return all
}

// Every query of the dashboards asks for metrics that there are, and in a way that suits them.
func TestDashboardsKeepToTheContract(t *testing.T) {
	// What has to be seen
	both := []string{
		"<h>.containers.{running,paused,stopped}", "<c>.cpu.percent", "<c>.memory.{working_set,percent}",
		"<c>.network.{rx,tx}_{bytes,errors,dropped}",
		"<c>.blkio.{read,write}_bytes", "<c>.pids.current", "<c>.restarts", "<c>.health", "<c>.uptime",
		"<h>.events.{die,oom}",
		"<h>.metrics.{duration,sampled,failed,collisions,sent,retried,dropped,spooled}",
	}
	needed := map[string][]string{
		"deploy/grafana.json": append(both[:len(both):len(both)],
			"<c>.cpu.{total,kernel,user,limit}", "<c>.cpu.throttling.{periods,throttled_periods}",
			"<c>.memory.limit"),
		"deploy/graphite-dashboard.json": append(both[:len(both):len(both)],
			"<c>.cpu.throttling.throttled_time"),
	}
	functions := map[string]bool{}
	for file, begins := range dashboards {
		q := &queryCheck{begins, contracts(t), map[string]bool{}, functions}
		queries := 0
		for _, g := range graphs(t, file) {
			for _, query := range g.queries {
				queries++
				e, err := parseQuery(query)
				if err != nil {
					t.Errorf("%s: %s: %s: %v", file, g.title, query, err)
					continue
				}
				unit, err := q.unit(e, "")
				if err != nil {
					t.Errorf("%s: %s: %s: %v", file, g.title, query, err)
				} else if !slices.Contains(labels[unit], g.label) {
					t.Errorf("%s: %s: %s is in %q, the axis says %q", file, g.title, query, unit, g.label)
				}
			}
		}
		var whole any
		readJSON(t, file, &whole)
		if all := targets(whole); queries < 15 || len(all) != queries {
			t.Errorf("%s: %d queries in its graphs, %d in all", file, queries, len(all))
		}
		for _, names := range needed[file] {
			for _, name := range harness.Expand(names) {
				if !q.used[name] {
					t.Errorf("%s does not show %s", file, name)
				}
			}
		}
	}
	for _, function := range graphiteFunctions {
		if !functions[function] && function != "transformNull" {
			t.Errorf("no dashboard uses %s", function)
		}
	}
}

// aliasSub leaves the container's name of what Graphite calls a series, and the metric's where
// there are several.
func TestDashboardLegends(t *testing.T) {
	n := 0
	for file := range dashboards {
		for _, g := range graphs(t, file) {
			for _, query := range g.queries {
				e, err := parseQuery(query)
				if err != nil || e.function != "aliasSub" {
					continue
				}
				n++
				find := regexp.MustCompile(strings.ReplaceAll(e.args[1].literal, "$prefix", "docker"))
				to := regexp.MustCompile(`\\(\d)`).ReplaceAllString(e.args[2].literal, "$${$1}")
				path := strings.NewReplacer("$prefix", "docker", "$host.**", "web1.web", "**",
					"web1.web").Replace(e.paths()[0])
				all := harness.Expand(path)
				for _, path := range all {
					want := "web1.web"
					if len(all) > 1 {
						want += " " + path[strings.LastIndex(path, ".")+1:]
					}
					if strings.Contains(query, "perSecond(") {
						path = "scale(perSecond(" + path + "),8)"
					}
					if got := find.ReplaceAllString(path, to); got != want {
						t.Errorf("%s: %s: %s becomes %q, not %q", file, g.title, path, got, want)
					}
				}
			}
		}
	}
	if n < 10 {
		t.Errorf("only %d legends", n)
	}
}

// What is wrong is found.
func TestDashboardQueriesThatAreWrong(t *testing.T) {
	q := &queryCheck{dashboards["deploy/grafana.json"], contracts(t), map[string]bool{},
		map[string]bool{}}
	for query, want := range map[string]string{
		"$prefix.$container.cpu.percent":                                   "%",
		"scale(perSecond($prefix.$container.cpu.{total,user}), 0.0000001)": "ns/s × 0.0000001",

		"alias(consolidateBy(nonNegativeDerivative($prefix.$container.restarts), 'sum'), 'a')": "",

		"$prefix.$host.metrics.spooled": "bytes",
	} {
		e, err := parseQuery(query)
		if err != nil {
			t.Errorf("%s: %v", query, err)
			continue
		}
		if unit, err := q.unit(e, ""); err != nil || unit != want {
			t.Errorf("%s: %q, %v; want %q", query, unit, err, want)
		}
	}
	for _, query := range []string{
		"", "1", "'text'", "alias($prefix.$host.metrics.sent", "alias()",
		"alias('a', $prefix.$container.uptime)", "$prefix.$container.uptime)",
		"$prefix.$container.cpu.total",                                // a raw counter
		"scale($prefix.$container.cpu.total, 2)",                      // likewise
		"scale(perSecond(scale($prefix.$container.cpu.total, 2)), 2)", // too late
		"perSecond($prefix.$container.memory.usage)",                  // a gauge
		"perSecond(alias($prefix.$container.cpu.percent, 'a'))",       // likewise
		"$prefix.$container.cpu.usage",                                // no such metric
		"perSecond($prefix.$container.network.{rx,tx}_{bytes,lost})",  // one of them
		"perSecond($prefix.$container.network.rx_{bytes,errors})",     // not of one unit
		// of a host, of a container
		"perSecond($prefix.$host.cpu.total)", "$prefix.$container.metrics.duration",
		// of a path of its own
		"$prefix.web.cpu.percent", "$container.cpu.percent", "other.**.cpu.percent",
		// functions that are not to be used
		"derivative($prefix.$container.cpu.total)", "sumSeries($prefix.**.restarts)",
		"asPercent($prefix.$container.memory.usage, $prefix.$container.uptime)", // bytes of seconds
	} {
		e, err := parseQuery(query)
		if err == nil {
			_, err = q.unit(e, "")
		}
		if err == nil {
			t.Errorf("nothing is wrong with %s", query)
		}
	}
}

// The dashboard is the one that script/grafana makes of its table of panels, after Grafana's own
// library has read it strictly.
func TestGrafanaDashboardIsGenerated(t *testing.T) {
	var complaint strings.Builder
	generate := exec.Command("go", "run", "-C", "script/grafana", ".")
	generate.Dir = harness.Top(t)
	generate.Env = append(os.Environ(), "GOFLAGS=")
	generate.Stderr = &complaint
	made, err := generate.Output()
	if strings.Contains(complaint.String(), "dial tcp") {
		harness.Cannot(t, "Grafana's library cannot be had: %s", complaint.String())
	} else if err != nil {
		t.Fatalf("%v: %s", err, complaint.String())
	}
	if string(made) != harness.ReadFile(t, "deploy/grafana.json") {
		t.Error("run go run -C script/grafana . >deploy/grafana.json")
	}
}

// What the types do not say: where panels are, and what their queries ask.
func TestGrafanaDashboardIsWhole(t *testing.T) {
	var d grafanaDashboard
	readJSON(t, "deploy/grafana.json", &d)
	if d.SchemaVersion < 36 { // since Grafana 9 a data source is a type and a uid
		t.Errorf("schema version %d", d.SchemaVersion)
	}
	ids, cells := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.ID == 0 {
			t.Errorf("%s: the id %d is missing, or another's too", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := cells[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%s lies on %q, or over the edge", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 || len(p.Panels) > 0 || p.Datasource.UID != "${datasource}" ||
			p.Datasource.Type != "graphite" {
			t.Errorf("%s: %d queries to %+v", p.Title, len(p.Targets), p.Datasource)
		}
		refs := map[string]bool{}
		for _, target := range p.Targets {
			if refs[target.RefID] || target.RefID == "" || target.Datasource != p.Datasource {
				t.Errorf("%s: the query %q to %+v", p.Title, target.RefID, target.Datasource)
			}
			refs[target.RefID] = true
		}
	}
	if len(d.Panels) < 15 {
		t.Errorf("only %d panels", len(d.Panels))
	}
}

// What Grafana offers for a variable: what its regexp finds in the paths that its query expands to.
func TestGrafanaVariables(t *testing.T) {
	var d grafanaDashboard
	readJSON(t, "deploy/grafana.json", &d)
	q := &queryCheck{dashboards["deploy/grafana.json"], contracts(t), nil, nil}
	var names []string
	for _, v := range d.Templating.List {
		names = append(names, v.Name)
		if v.Type != "query" {
			continue
		}
		query, isExpand := strings.CutPrefix(v.Query, "expand(")
		metric, err := q.names(strings.Replace(strings.TrimSuffix(query, ")"), "$prefix.*.",
			"$prefix.$host.", 1))
		if err != nil || !isExpand {
			t.Errorf("%s: %s: %v", v.Name, v.Query, err)
			continue
		}
		find := regexp.MustCompile(strings.ReplaceAll(strings.Trim(v.Regex, "/"), "$prefix", "docker"))
		offered := []string{"web1"}
		if v.Name == "container" {
			offered = []string{"web", "my.name", "web1.web", "shop.web.1"}
		}
		for _, want := range offered {
			_, tail, _ := strings.Cut(metric[0], ">")
			if m := find.FindStringSubmatch("docker." + want + tail); m == nil || m[1] != want {
				t.Errorf("%s: %s finds %q, not %s", v.Name, v.Regex, m, want)
			}
		}
	}
	if want := []string{"datasource", "prefix", "host", "container"}; !slices.Equal(names, want) {
		t.Errorf("variables %q, want %q", names, want)
	}
}

// The targets are in there twice, and have to be the same.
func TestGraphiteDashboardIsWhole(t *testing.T) {
	var d struct {
		Name                                 string
		TimeConfig, RefreshConfig, GraphSize map[string]any
		DefaultGraphParams                   map[string]any
		Graphs                               []graphiteGraph
	}
	readJSON(t, "deploy/graphite-dashboard.json", &d)
	if d.Name == "" || d.TimeConfig == nil || d.RefreshConfig == nil || d.GraphSize == nil ||
		d.DefaultGraphParams == nil || len(d.Graphs) < 15 {
		t.Errorf("something is missing: %+v", d)
	}
	for _, g := range d.Graphs {
		if in, err := url.ParseQuery(g.id); err != nil || !slices.Equal(in["target"], g.params.Target) {
			t.Errorf("%s: %q, %v, and %q", g.params.Title, in["target"], err, g.params.Target)
		}
	}
}

// docs/dashboards.md shows the pictures that there are, and none weighs much.
func TestPictures(t *testing.T) {
	shown := harness.AllOf(`!\[[^]]+\]\(\.\./(deploy/pictures/[^)]+)\)`,
		harness.ReadFile(t, "docs/dashboards.md"))
	files := os.DirFS(harness.Top(t))
	there, err := fs.Glob(files, "deploy/pictures/*")
	if err != nil || len(there) < 2 || !slices.Equal(shown, there) {
		t.Errorf("docs/dashboards.md shows %q, there are %q, %v", shown, there, err)
	}
	for _, file := range there {
		if info, err := fs.Stat(files, file); err != nil || info.Size() > 40<<10 {
			t.Errorf("%s: %v, more than 40 KB", file, err)
		}
	}
}

// Every expression of docs/alerts.md asks for metrics that there are, and in a way that suits them.
func TestAlertsKeepToTheContract(t *testing.T) {
	q := &queryCheck{[][2]string{{"docker.**.", "<c>."}, {"docker.web1.web.", "<c>."},
		{"docker.*.", "<h>."}}, contracts(t), map[string]bool{}, map[string]bool{}}
	page := harness.ReadFile(t, "docs/alerts.md")
	rows := regexp.MustCompile("(?m)^\\| [^|]+ \\| `([^`]+)` \\| (?:min|max|sum) [<>] \\d+ \\|$").
		FindAllStringSubmatch(page, -1)
	if len(rows) < 9 || len(rows) != strings.Count(page, "\n| ")-2 {
		t.Errorf("only %d alerts are understood", len(rows))
	}
	for _, row := range rows {
		e, err := parseQuery(row[1])
		if err == nil {
			_, err = q.unit(e, "")
		}
		if err != nil {
			t.Errorf("%s: %v", row[1], err)
		}
	}
}

// A user of another tool is led to metrics that exist.
func TestMigrationNamesMetrics(t *testing.T) {
	metrics := contracts(t)
	named := harness.AllOf("`(<[ch]>\\.[^`]+)`", harness.ReadFile(t, "docs/migration.md"))
	n := 0
	for _, names := range named {
		for _, name := range harness.Expand(names) {
			n++
			if _, ok := metrics[name]; !ok {
				t.Errorf("docs/migration.md has %s, docs/metrics.md has not", name)
			}
		}
	}
	if n < 50 {
		t.Errorf("docs/migration.md names only %d metrics", n)
	}
	// The name that it works out is the one that the recipe makes.
	recipe := regexp.MustCompile("(?m)^\\| a fleet of Compose projects, .* \\| `([^`|]+)\\.\\*` \\|$").
		FindStringSubmatch(harness.ReadFile(t, "docs/names.md"))
	if recipe == nil || !strings.Contains(harness.ReadFile(t, "docs/migration.md"),
		"| `docker."+recipe[1]+".cpu.percent` |") {
		t.Errorf("docs/names.md makes %q, docs/migration.md something else", recipe)
	}
}
