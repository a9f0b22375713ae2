// Draws a dashboard's panels with Grafana's own components, from the results that draw.py has queried from Prometheus.
// Heat maps, which @grafana/ui lacks, are pictures that draw.py has drawn.
import {
  applyFieldOverrides,
  createTheme,
  dateTime,
  FieldType,
  getDisplayValueAlignmentFactors,
  getFieldDisplayValues,
  standardTransformers,
  standardTransformersRegistry,
  ThemeContext,
  toDataFrame,
  transformDataFrame,
} from '@grafana/data';
import { BarGauge, BigValue, PanelChrome, TimeSeries, VizRepeater } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';
import 'uplot/dist/uPlot.min.css';

const theme = createTheme({ colors: { mode: 'light' } });
const { dashboard, results, rows, start, end, interval, cell } = window.DRAWN;
const range = { from: dateTime(start), to: dateTime(end), raw: { from: dateTime(start), to: dateTime(end) } };
const verbatim = (text) => text;

const { organizeFieldsTransformer, sortByTransformer, groupingToMatrixTransformer } = standardTransformers;
standardTransformersRegistry.setInit(() =>
  [organizeFieldsTransformer, sortByTransformer, groupingToMatrixTransformer].map((one) => ({ ...one, transformation: async () => one }))
);

// As Grafana's data source for Prometheus: a frame per series, or one table with a column per label.
function frames(panel) {
  return panel.targets.flatMap((target, index) => {
    const found = results[panel.id][index];
    if (target.format === 'table') {
      const labels = [...new Set(found.flatMap((series) => Object.keys(series.metric)))].sort();
      const time = found.map((series) => series.values[0][0]);
      const fields = [
        { name: 'Time', type: FieldType.time, values: time },
        ...labels.map((label) => ({ name: label, type: FieldType.string, values: found.map((series) => series.metric[label] ?? '') })),
        { name: 'Value', type: FieldType.number, values: found.map((series) => series.values[0][1]) },
      ];
      return found.length ? [toDataFrame({ refId: target.refId, fields })] : [];
    }
    return found.map((series) =>
      toDataFrame({
        refId: target.refId,
        fields: [
          { name: 'Time', type: FieldType.time, values: series.values.map(([at]) => at), config: { interval } },
          {
            name: 'Value',
            type: FieldType.number,
            labels: series.metric,
            values: series.values.map(([, value]) => value),
            config: { displayNameFromDS: series.legend },
          },
        ],
      })
    );
  });
}

// What the panel's own options are to its fields. Grafana's registry of options is a part of its server.
function configured(panel, data) {
  for (const field of data.flatMap((frame) => frame.fields)) {
    const isValue = field.type === FieldType.number;
    const { custom, ...defaults } = panel.fieldConfig.defaults;
    field.config = { ...(isValue ? defaults : {}), ...field.config, custom: custom ?? {} };
  }
  for (const { matcher, properties } of panel.fieldConfig.overrides) {
    for (const field of data.flatMap((frame) => frame.fields).filter((field) => field.name === matcher.options)) {
      const own = properties.map(({ id, value }) => [id.replace('custom.', ''), value]);
      field.config.custom = { ...field.config.custom, ...Object.fromEntries(own) };
    }
  }
  return applyFieldOverrides({ data, fieldConfig: { defaults: {}, overrides: [] }, replaceVariables: verbatim, theme, timeZone: 'utc' });
}

function values(panel, data) {
  const { reduceOptions } = panel.options;
  const fieldConfig = { defaults: {}, overrides: [] };
  return getFieldDisplayValues({ fieldConfig, reduceOptions, replaceVariables: verbatim, theme, data, sparkline: true, timeZone: 'utc' });
}

function repeated(panel, data, width, height, draw, orientation, sizes) {
  return (
    <VizRepeater
      source={data}
      getValues={() => values(panel, data)}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={draw}
      renderCounter={0}
      width={width}
      height={height}
      orientation={orientation}
      {...sizes}
    />
  );
}

const kinds = {
  stat: (panel, data, width, height) =>
    repeated(panel, data, width, height, ({ value, width, height, count }) => (
      <BigValue
        {...panel.options}
        value={value.display}
        sparkline={value.sparkline}
        count={count}
        width={width}
        height={height}
        theme={theme}
      />
    ), 'auto', { autoGrid: true }),
  bargauge: (panel, data, width, height) =>
    repeated(panel, data, width, height, ({ value, width, height, orientation, alignmentFactors }) => (
      <BarGauge
        {...panel.options}
        valueDisplayMode={panel.options.valueMode}
        alignmentFactors={alignmentFactors}
        field={value.field}
        display={value.view?.getFieldDisplayProcessor(value.colIndex)}
        value={value.display}
        orientation={orientation}
        width={width}
        height={height}
        theme={theme}
        itemSpacing={4}
      />
    ), 'horizontal', { minVizHeight: panel.options.minVizHeight, maxVizHeight: panel.options.maxVizHeight, itemSpacing: 4 }),
  timeseries: (panel, data, width, height) => (
    <TimeSeries frames={data} timeRange={range} timeZone="utc" width={width} height={height} legend={panel.options.legend} options={panel.options} />
  ),
  table: (panel, data, width, height) => <TableNG data={data[0]} width={width} height={height} {...panel.options} />,
  heatmap: (panel, data, width, height) => <img src={`heatmap-${panel.id}.png`} width={width} height={height} />,
};

function Panel({ panel, data }) {
  const { w, h } = panel.gridPos;
  const empty = panel.type !== 'heatmap' && !data.length;
  return (
    <PanelChrome title={panel.title} width={w * cell.width - cell.gap} height={h * cell.height - cell.gap}>
      {(width, height) => (empty ? <div style={{ textAlign: 'center', color: theme.colors.text.secondary }}>No data</div> : kinds[panel.type](panel, data, width, height))}
    </PanelChrome>
  );
}

async function main() {
  const made = [];
  for (const panel of dashboard.panels) {
    const { x, y, w } = panel.gridPos;
    const style = { position: 'absolute', left: x * cell.width + cell.gap, top: (y - rows[0]) * cell.height + cell.gap, width: w * cell.width };
    if (panel.type === 'row') {
      made.push(<div key={panel.id} style={{ ...style, ...theme.typography.h5 }}>{panel.title}</div>);
      continue;
    }
    let data = panel.type === 'heatmap' ? [] : frames(panel);
    if (panel.transformations?.length && data.length) {
      data = await lastValueFrom(transformDataFrame(panel.transformations, data, { interpolate: verbatim }));
    }
    made.push(<div key={panel.id} style={style}><Panel panel={panel} data={configured(panel, data)} /></div>);
  }
  document.body.style = `margin: 0; background: ${theme.colors.background.canvas}; font-family: ${theme.typography.fontFamily}; font-size: 14px; color: ${theme.colors.text.primary}`;
  createRoot(document.getElementById('root')).render(<ThemeContext.Provider value={theme}>{made}</ThemeContext.Provider>);
}

main();
