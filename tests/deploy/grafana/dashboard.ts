// What a dashboard of this project may consist of, in Grafana's types: `OurDashboard` is theirs with each kind of panel
// given its own options. Grafana's enums become the strings and numbers that they are in JSON.
import type { AnnotationQuery, Dashboard, Panel, RowPanel, VariableModel } from '@grafana/schema';
import type * as bargauge from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type * as heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

type Json<T> = T extends string
  ? `${T}`
  : T extends number
    ? `${number}` extends `${T}`
      ? number
      : `${T}` extends `${infer N extends number}`
        ? N
        : never
    : T extends object
      ? { [K in keyof T]: Json<T[K]> }
      : T;

// Grafana publishes no type of a Prometheus query; these are the fields that its editor writes.
interface Query {
  refId: string;
  datasource: { type: 'prometheus'; uid: string };
  editorMode: 'code' | 'builder';
  expr: string;
  format: 'time_series' | 'table' | 'heatmap';
  instant: boolean;
  legendFormat: string;
  range: boolean;
}

type Fields = NonNullable<Panel['fieldConfig']>;
type Ours = 'type' | 'options' | 'targets' | 'fieldConfig';

type Kind<Type extends string, Options, Field = {}> = Omit<Panel, Ours> &
  Required<Pick<Panel, 'id' | 'gridPos' | 'title' | 'description'>> & {
    type: Type;
    options: Options;
    targets: Query[];
    fieldConfig: Omit<Fields, 'defaults'> & { defaults: Omit<Fields['defaults'], 'custom'> & { custom?: Field } };
  };

type OurPanel =
  | Kind<'stat', stat.Options>
  | Kind<'timeseries', timeseries.Options, timeseries.FieldConfig>
  | Kind<'heatmap', heatmap.Options, heatmap.FieldConfig>
  | Kind<'bargauge', bargauge.Options>
  | Kind<'table', table.Options, table.FieldConfig>;

export type OurDashboard = Json<
  Omit<Dashboard, 'panels' | 'annotations' | 'templating'> & {
    uid: string;
    title: string;
    panels: (OurPanel | (Omit<RowPanel, 'panels'> & { panels: OurPanel[] }))[];
    annotations: { list: (Omit<AnnotationQuery, 'target'> & { target: Query; titleFormat: string })[] };
    templating: { list: VariableModel[] };
  }
>;
