// Command grafana prints deploy/grafana.json, made of the table of panels in table.go:
//
//	go run -C script/grafana . >deploy/grafana.json
//
// It is a module of its own, so that the daemon does not depend on Grafana's library.
package main

import (
	"encoding/json"
	"log"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

//lint:file-ignore SA1019 every Grafana since 9 reads this form, only the newest the other one

func main() {
	log.SetFlags(0)
	plugins.RegisterDefaultPlugins()
	built, err := build()
	if err != nil {
		log.Fatal(err)
	}
	text, err := json.MarshalIndent(built, "", "  ")
	if err != nil {
		log.Fatal(err)
	}
	// What the library's strict reader refuses, Grafana may not show. An empty list of its errors is
	// an error too, but not nil.
	var read dashboard.Dashboard
	if err := read.UnmarshalJSONStrict(text); err != nil && err.Error() != "" {
		log.Fatal(err)
	}
	os.Stdout.Write(append(text, '\n'))
}

var source = common.DataSourceRef{Type: cog.ToPtr("graphite"), Uid: cog.ToPtr("${datasource}")}

// build returns the dashboard of the table.
func build() (dashboard.Dashboard, error) {
	board := dashboard.NewDashboardBuilder("Docker containers").
		Uid("docker-stats-to-backstop").
		Description("What docker-stats-to-backstop sends: a host at a glance, a container, and "+
			"the program's own work.").
		Tags([]string{"docker", "graphite"}).
		Version(1).
		Editable().
		Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Timezone("browser").
		Refresh("1m").
		Time("now-6h", "now")
	for _, variable := range variables() {
		board.WithVariable(variable)
	}
	id := uint32(0)
	for _, row := range rows {
		id++
		board.WithRow(dashboard.NewRowBuilder(row.title).Id(id))
		for _, p := range row.panels {
			id++
			board.WithPanel(p.build(id))
		}
	}
	return board.Build()
}

func variables() []cog.Builder[dashboard.VariableModel] {
	text := func(s string) dashboard.StringOrMap { return dashboard.StringOrMap{String: &s} }
	option := func(s string) dashboard.StringOrArrayOfString {
		return dashboard.StringOrArrayOfString{String: &s}
	}
	query := func(name, label, query, regex string) cog.Builder[dashboard.VariableModel] {
		return dashboard.NewQueryVariableBuilder(name).
			Label(label).
			Datasource(source).
			Query(text(query)).
			Definition(query).
			Regex(regex).
			Refresh(dashboard.VariableRefreshOnTimeRangeChanged).
			Sort(dashboard.VariableSortAlphabeticalCaseInsensitiveAsc)
	}
	docker := dashboard.VariableOption{Selected: cog.ToPtr(true), Text: option("docker"),
		Value: option("docker")}
	return []cog.Builder[dashboard.VariableModel]{
		dashboard.NewDatasourceVariableBuilder("datasource").
			Label("Graphite").
			Type("graphite"),
		dashboard.NewTextBoxVariableBuilder("prefix").
			Label("Prefix").
			Description("What Backstop puts before each name: the last part of the path in --backstop.").
			DefaultValue(text("docker")).
			Current(docker).
			Options([]dashboard.VariableOption{docker}),
		query("host", "Host", "expand($prefix.*.metrics.duration)",
			`/^$prefix\.([^.]+)\.metrics\.duration$/`),
		query("container", "Container", "expand($prefix.**.cpu.total)",
			`/^$prefix\.(.+)\.cpu\.total$/`),
	}
}

// build returns the panel as Grafana has it.
func (p panel) build(id uint32) cog.Builder[dashboard.Panel] {
	var targets []cog.Builder[variants.Dataquery]
	for i, q := range p.queries {
		targets = append(targets, target{string(rune('A' + i)), q})
	}
	if p.number == nil {
		draw, fill := common.GraphDrawStyleLine, 10.0
		if p.bars {
			draw, fill = common.GraphDrawStyleBars, 50
		}
		graph := timeseries.NewPanelBuilder().
			Id(id).Title(p.title).Datasource(source).Span(p.width).Height(p.height).
			Unit(p.unit).Min(0).
			DrawStyle(draw).LineWidth(1).FillOpacity(fill).
			ShowPoints(common.VisibilityModeNever).
			Legend(common.NewVizLegendOptionsBuilder().
				DisplayMode(common.LegendDisplayModeList).
				Placement(common.LegendPlacementBottom).
				ShowLegend(true)).
			Tooltip(common.NewVizTooltipOptionsBuilder().
				Mode(common.TooltipDisplayModeMulti).
				Sort(common.SortOrderDescending)).
			Targets(targets)
		if p.about != "" {
			graph.Description(p.about)
		}
		if p.max > 0 {
			graph.Max(p.max)
		}
		return graph
	}
	number := stat.NewPanelBuilder().
		Id(id).Title(p.title).Datasource(source).Span(p.width).Height(p.height).
		Unit(p.unit).
		GraphMode(common.BigValueGraphModeNone).
		ColorMode(common.BigValueColorModeNone).
		ReduceOptions(common.NewReduceDataOptionsBuilder().Calcs([]string{p.number.reduce})).
		Targets(targets)
	if p.about != "" {
		number.Description(p.about)
	}
	if len(p.number.colours) > 0 {
		number.ColorMode(common.BigValueColorModeValue).
			ColorScheme(dashboard.NewFieldColorBuilder().Mode(dashboard.FieldColorModeIdThresholds)).
			Thresholds(dashboard.NewThresholdsConfigBuilder().
				Mode(dashboard.ThresholdsModeAbsolute).
				Steps(p.number.colours))
	}
	if len(p.number.words) > 0 {
		words := dashboard.NewValueMap()
		words.Options = p.number.words
		number.Mappings([]dashboard.ValueMapping{{ValueMap: words}}).NoValue(p.number.none)
	}
	return number
}

// target is a query of a panel. The library has no type for those of Graphite.
type target struct{ ref, query string }

func (t target) Build() (variants.Dataquery, error) {
	return variants.UnknownDataquery{"refId": t.ref, "datasource": source, "textEditor": true,
		"target": t.query}, nil
}
